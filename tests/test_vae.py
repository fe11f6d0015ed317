"""vae.py in isolation: the formulas against hand-computed numbers, the files, the models and
pictures it reads, the sentences for bad input, and what every script shares."""

import json
import logging
import math
import os
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPImageProcessor
from transformers.hf_argparser import HfArg

import drawn_scenes
import vae as vae_script
from rewards import DEFAULT_WORLD, world_root
from vae import (
    VAE,
    GPTDecoder,
    Reader,
    VAEConfig,
    check_traces,
    draw_latents,
    fill_in,
    fit_domains,
    load_model,
    load_reader,
    load_traces,
    mean_pool,
    open_image,
    parse_settings,
    pca,
    pool_parts,
    read_json,
    report,
    require_at_least,
    require_choices,
    require_same,
    resolve_world,
    result_settings,
    run_main,
    see_images,
    train,
    train_vae,
    write_text,
)


def table_of(model):
    return model.get_input_embeddings().weight.detach()


def write_jsonl(path, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return str(path)


# ---- h ------------------------------------------------------------------------------------------


class Words:
    """A stand-in tokenizer: words are numbers, so that embeddings can be written down by hand."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def test_h_is_the_mean_of_the_raw_embeddings_of_question_and_answer():
    table = torch.tensor([[0.0, 0.0], [1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    first = {"question": "1 2", "answer": "3", "domain": "a"}
    second = {"question": "", "answer": "3 1", "domain": "a"}
    assert mean_pool([first, second], Words(), table).tolist() == [[3.0, 30.0], [3.5, 35.0]]


def test_a_trace_without_tokens_is_refused(model):
    trace = {"question": "", "answer": "", "domain": "a"}
    with pytest.raises(ValueError, match="no tokens"):
        mean_pool([trace], Words(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="no tokens"):
        pool_parts([trace], Reader(Words()), model)


# ---- the VAE ------------------------------------------------------------------------------------


def hand_made_vae(mu, log_var):
    """A VAE whose encoder gives (mu, log_var) and whose decoder 0, whatever comes in.

    Its mean is 1 and its scale 2.
    """
    vae = VAE(width=3, latent=2, hidden=4)
    for parameter in vae.parameters():
        parameter.data.zero_()
    vae.encoder[2].bias.data = torch.tensor([*mu, *log_var], dtype=torch.float32)
    vae.mean.fill_(1.0)
    vae.scale.fill_(2.0)
    return vae


def test_loss_by_hand():
    vae = hand_made_vae(mu=(1.0, 0.0), log_var=(0.0, math.log(4.0)))
    h = torch.tensor([[3.0, 1.0, -3.0]])  # standardised: (1, 0, -2), squared sum 5
    noise = torch.Generator().manual_seed(0)
    reconstruction, kl, total = vae.loss(h, beta=0.5, generator=noise)
    assert reconstruction.item() == pytest.approx(5.0)

    # KL(N(1, 1) || N(0, 1)) = 1/2;  KL(N(0, 4) || N(0, 1)) = (4 - 1 - ln 4) / 2
    assert kl.tolist() == pytest.approx([0.5, (3 - math.log(4)) / 2])
    assert total.item() == pytest.approx(5 + 0.5 * (0.5 + (3 - math.log(4)) / 2))


def test_z_is_mu_plus_sigma_epsilon():
    vae = hand_made_vae(mu=(5.0, -5.0), log_var=(math.log(4.0), math.log(4.0)))
    # a decoder that is the identity: z -> (z0, z1, 0)
    vae.decoder[0].weight.data = torch.eye(4, 2)
    vae.decoder[1] = torch.nn.Identity()
    vae.decoder[2].weight.data = torch.eye(3, 4) * torch.tensor([[1.0], [1.0], [0.0]])

    h = torch.ones(20_000, 3)  # standardised: 0, so the reconstruction error is |z|^2
    noise = torch.Generator().manual_seed(0)
    reconstruction, _, _ = vae.loss(h, beta=0.0, generator=noise)
    assert reconstruction.item() == pytest.approx(2 * (25 + 4), rel=0.02)  # mu^2 + sigma^2, twice


def test_decoding_ends_in_the_space_of_token_embeddings():
    vae = hand_made_vae((0, 0), (0, 0))
    vae.decoder[2].bias.data = torch.tensor([1.0, 0.0, -1.0])
    assert vae.decode(torch.zeros(5, 4, 2)).shape == (5, 4, 3)
    assert vae.decode(torch.zeros(2)).tolist() == [3.0, 1.0, -1.0]  # output * scale + mean


def test_domain_gaussians_hold_the_moments_of_their_own_latents():
    vae = VAE(width=2, latent=2, hidden=4, domains=["a", "b"])
    log_quarter = math.log(0.25)
    vae.encode = lambda h: (h, torch.full_like(h, log_quarter))  # mu = h, sigma^2 = 1/4
    h = torch.tensor([[0.0, 0.0], [2.0, 2.0], [10.0, 0.0], [10.0, 4.0]])
    fit_domains(vae, h, torch.tensor([0, 0, 1, 1]))

    assert vae.domain_mean.tolist() == [[1.0, 1.0], [10.0, 2.0]]
    covariances = vae.domain_factor.transpose(1, 2) @ vae.domain_factor
    expected = [[[2.25, 2.0], [2.0, 2.25]], [[0.25, 0.0], [0.0, 8.25]]]
    torch.testing.assert_close(covariances, torch.tensor(expected))


def test_a_policy_is_recognised_by_its_embedding_table(vae, model):
    table = table_of(model)
    vae.check_policy(table)
    fine_tuned = table + 0.05 * table.std() * torch.randn(table.shape)
    vae.check_policy(fine_tuned)
    with pytest.raises(ValueError, match="width 128.*width 64"):
        vae.check_policy(table[:, :64])
    with pytest.raises(ValueError, match="another embedding table"):
        vae.check_policy(table.roll(1, 0))


def test_the_gpt_decoder_is_causal_and_batches_like_single_rows():
    torch.manual_seed(0)
    decoder = GPTDecoder(width=6, latent=32, hidden=16, rows=8).eval()
    z = torch.randn(5, 32)
    rows = decoder(z).view(5, 8, 6)

    changed = z.clone()
    changed[:, 12:] += 1  # parts 3 to 7 of 8
    rows_of_changed = decoder(changed).view(5, 8, 6)
    torch.testing.assert_close(rows_of_changed[:, :3], rows[:, :3])
    difference = (rows_of_changed - rows).abs().amax((0, 2))  # [8]
    assert difference[3:].min() > 1e-4

    one_by_one = torch.cat([decoder(z[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(one_by_one, rows.flatten(1))
    with pytest.raises(ValueError, match="multiple of 8"):
        GPTDecoder(width=6, latent=30, hidden=16, rows=8)


def test_pca_follows_the_long_axis():
    along = torch.linspace(-3, 3, 50)
    points = torch.stack([along, 2 * along, 0.01 * torch.sin(along * 9)], 1) + 7
    projected = pca(points, 1)[:, 0]
    torch.testing.assert_close(projected.abs(), along.abs() * math.sqrt(5), atol=1e-2, rtol=0)


def test_report_on_a_vae_that_carries_nothing():
    figures = report(hand_made_vae((0, 0), (0, 0)), 1 + 2 * torch.eye(3), torch.ones(4, 3))
    assert figures["reconstruction"] == figures["predict_the_mean"] == pytest.approx(1.0)
    assert figures["active_units"] == 0
    assert figures["kl_per_dimension"] == [0.0, 0.0]
    assert figures["token_embedding_norm"] == pytest.approx(math.sqrt(3), abs=1e-4)


# ---- training -----------------------------------------------------------------------------------


def test_training_beats_the_mean_and_a_huge_beta_shows_as_collapse(tmp_path, reader, traces, model):
    config = VAEConfig(out=str(tmp_path / "good"), epochs=30)
    vae = train_vae(config, traces, reader, model)
    figures = read_json(tmp_path / "good" / "config.json")["report"]
    assert figures["reconstruction"] < 0.8 * figures["predict_the_mean"]
    assert figures["active_units"] == vae.latent == 8

    config = replace(config, out=str(tmp_path / "dead"), beta=1000.0)
    train_vae(config, traces, reader, model)
    figures = read_json(tmp_path / "dead" / "config.json")["report"]
    assert figures["active_units"] == 0
    assert figures["reconstruction"] > 0.95 * figures["predict_the_mean"]


def test_every_tenth_trace_is_held_out(tmp_path, reader, traces, model):
    other_traces = []
    for i, trace in enumerate(traces):
        if i % 10 == 9:
            trace = {**trace, "answer": "hello room"}
        other_traces.append(trace)

    config = VAEConfig(out=str(tmp_path / "a"), epochs=2)
    one = train_vae(config, traces, reader, model)
    two = train_vae(replace(config, out=str(tmp_path / "b")), other_traces, reader, model)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    measured = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert measured != (tmp_path / "b" / "metrics.jsonl").read_text()


def test_the_gauss_control_has_the_covariance_of_h(vae, tokenizer, traces, model):
    kept = [trace for i, trace in enumerate(traces) if i % 10 != 9]  # every tenth is held out
    h = mean_pool(kept, tokenizer, table_of(model))
    covariance = vae.gauss_factor.T @ vae.gauss_factor
    torch.testing.assert_close(covariance, torch.cov(h.T), atol=1e-7, rtol=1e-3)


def test_the_same_seed_gives_the_same_vae_and_a_saved_one_comes_back(
    tmp_path, reader, traces, model
):
    config = VAEConfig(out=str(tmp_path / "a"), epochs=2)
    state = torch.get_rng_state()
    first = train_vae(config, traces, reader, model)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator plays no part
    torch.rand(3)
    second = train_vae(replace(config, out=str(tmp_path / "b")), traces, reader, model)
    loaded = VAE.load(tmp_path / "a")
    start = train_vae(replace(config, lr=0), traces, reader, model)
    other_start = train_vae(replace(config, lr=0, seed=1), traces, reader, model)

    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not torch.equal(start.encoder[0].weight, other_start.encoder[0].weight)
    assert loaded.domains == first.domains
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_an_epoch_sees_every_trace_once_in_an_order_of_its_own(
    tmp_path, reader, traces, model, monkeypatch
):
    batches = []
    loss = VAE.loss

    def spy(self, h, beta, generator):
        if torch.is_grad_enabled():  # in training
            batches.append(h)
        return loss(self, h, beta, generator)

    monkeypatch.setattr(VAE, "loss", spy)
    config = VAEConfig(out=str(tmp_path), epochs=2, batch=100)
    train_vae(config, traces, reader, model)
    assert [len(batch) for batch in batches] == [100, 100, 70] * 2
    first = torch.cat(batches[:3])
    second = torch.cat(batches[3:])
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_epochs_are_measured_with_the_same_noise(tmp_path, reader, traces, model):
    train_vae(VAEConfig(out=str(tmp_path), epochs=2, lr=0), traces, reader, model)
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {**json.loads(second), "epoch": 1}


def test_too_few_traces_are_refused_before_any_work(tmp_path, reader, traces, model, monkeypatch):
    monkeypatch.delattr(vae_script, "mean_pool")
    config = VAEConfig(out=str(tmp_path))
    with pytest.raises(ValueError, match="9 traces are too few"):
        train_vae(config, traces[:9], reader, model)
    alone = {"question": "q", "answer": "a", "domain": "alone"}
    with pytest.raises(ValueError, match="domain 'alone' has 1 trace"):
        train_vae(config, [*traces, alone], reader, model)


def test_the_picture_has_every_view(vae, tmp_path):
    mu = torch.randn(30, 8)
    save_file({"mu": mu, "domain": torch.arange(30) % 3}, tmp_path / "latents.safetensors")
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    picture = Image.open(draw_latents(vae, tmp_path))
    assert picture.width > 4 * picture.height  # two views by PCA, two by t-SNE


# ---- the stage: reuse, overwrite, damage --------------------------------------------------------


@pytest.fixture
def stage(tmp_path, policy_folder, traces, monkeypatch):
    """The settings of a short stage on the untrained policy, without the picture."""
    monkeypatch.setattr(vae_script, "draw_latents", lambda vae, folder: f"{folder}/drawn.png")
    path = write_jsonl(tmp_path / "t.jsonl", traces[:40])
    out = str(tmp_path / "vae")
    return VAEConfig(model=str(policy_folder), traces=[path], out=out, epochs=1)


def test_a_second_run_reuses_the_vae_and_refuses_other_settings(stage, tmp_path, capsys):
    train(stage)
    assert f"saved {stage.out}, picture {stage.out}/drawn.png" in capsys.readouterr().out
    weights = tmp_path / "vae" / "vae.safetensors"
    written = weights.stat().st_mtime_ns

    train(stage)
    train(replace(stage, latent=8, decoder="mlp"))  # what they were anyway
    assert weights.stat().st_mtime_ns == written
    assert f"using {stage.out}" in capsys.readouterr().out

    with pytest.raises(ValueError, match="another latent .was 8, now 4.*--overwrite"):
        train(replace(stage, latent=4))
    with pytest.raises(ValueError, match="another traces"):
        train(replace(stage, traces=["elsewhere.jsonl"]))
    train(replace(stage, latent=4, overwrite=True))
    assert VAE.load(stage.out).latent == 4


def test_the_command_line_trains_the_same_vae_as_the_function(stage, tmp_path):
    vae = train(stage)
    argv = ["--model", stage.model, "--traces", *stage.traces, "--epochs", "1"]
    vae_script.main([*argv, "--out", str(tmp_path / "other")])
    other = VAE.load(tmp_path / "other")
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    before = read_json(tmp_path / "vae" / "config.json")["settings"]
    assert read_json(tmp_path / "other" / "config.json")["settings"] == before


@pytest.mark.parametrize("broken", ["fit_domains", "write_text", "save_file"])
def test_overwrite_keeps_the_old_vae_until_the_new_one_is_complete(stage, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    old = train(stage)
    with monkeypatch.context() as patch:
        patch.setattr(vae_script, broken, fail)
        with pytest.raises(OSError, match="No space"):
            train(replace(stage, latent=4, overwrite=True))
    kept = train(stage)
    assert torch.equal(kept.encoder[2].weight, old.encoder[2].weight)

    train(replace(stage, latent=4, overwrite=True))
    files = {"config.json", "metrics.jsonl", "vae.safetensors", "latents.safetensors"}
    assert set(os.listdir(stage.out)) == files
    assert VAE.load(stage.out).latent == 4


def test_config_json_is_the_last_to_come_and_the_first_to_go(stage, monkeypatch):
    train(stage)
    moved = []

    def replace_some(source, target):
        if os.path.basename(target) == "vae.safetensors":
            raise KeyboardInterrupt
        os.rename(source, target)
        moved.append(os.path.basename(target))

    with monkeypatch.context() as patch:
        patch.setattr(vae_script.os, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            train(replace(stage, latent=4, overwrite=True))
    assert "metrics.jsonl" in moved  # the stop came while files were moved: of either VAE some
    with pytest.raises(ValueError, match="no VAE in"):
        VAE.load(stage.out)
    train(replace(stage, latent=4))
    assert VAE.load(stage.out).latent == 4


def test_a_missing_or_damaged_vae_is_one_sentence(tmp_path, reader, traces, model):
    with pytest.raises(ValueError, match="no VAE in"):
        VAE.load(tmp_path)
    train_vae(VAEConfig(out=str(tmp_path), epochs=1), traces, reader, model)
    weights = tmp_path / "vae.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        VAE.load(tmp_path)


def test_defaults_follow_the_model(policy_folder):
    of_text = fill_in(VAEConfig(), AutoConfig.from_pretrained(policy_folder))
    assert (of_text.decoder, of_text.latent, of_text.epochs) == ("mlp", 8, 60)
    config_of_scenes = drawn_scenes.make_model().config
    of_scenes = fill_in(VAEConfig(), config_of_scenes)
    assert (of_scenes.decoder, of_scenes.latent, of_scenes.epochs) == ("gpt", 128, 30)
    named = fill_in(VAEConfig(decoder="mlp", latent=3, epochs=5), config_of_scenes)
    assert (named.decoder, named.latent, named.epochs) == ("mlp", 3, 5)
    with pytest.raises(ValueError, match="multiple of 8.*not 12"):
        fill_in(VAEConfig(latent=12), config_of_scenes)


def test_a_model_that_is_no_world_needs_traces_and_a_folder(policy_folder):
    with pytest.raises(ValueError, match="--traces and --out are needed"):
        vae_script.main(["--model", str(policy_folder)])


def test_a_world_brings_its_base_model_traces_and_folder(monkeypatch):
    made = []
    monkeypatch.setattr("rewards.find_model", made.append)
    root = world_root(DEFAULT_WORLD)
    by_default = resolve_world(VAEConfig(epochs=3))
    expected = VAEConfig(
        model=f"{root}/base",
        traces=[f"{root}/base/traces.jsonl"],
        limit=10**9,
        out=f"{root}/vae",
        epochs=3,
    )
    assert result_settings(by_default) == result_settings(expected)
    assert by_default.out == expected.out
    assert made == [DEFAULT_WORLD]

    # bad traces of the user's are refused before the base model is made
    config = VAEConfig(model=DEFAULT_WORLD, traces=["nowhere.jsonl"], out="elsewhere")
    with pytest.raises(ValueError, match="no such file: nowhere.jsonl"):
        resolve_world(config)
    assert made == [DEFAULT_WORLD]

    no_world = VAEConfig(model="some/model", traces=["x.jsonl"])
    assert resolve_world(no_world) == no_world


# ---- traces -------------------------------------------------------------------------------------


def test_conversations_give_the_first_answered_human_turn(tmp_path):
    turns = [
        {"from": "gpt", "value": "hi"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    rows = [{"conversations": turns}, {"conversations": turns[:1]}]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    expected = {"question": "q", "answer": "a", "domain": "qa"}
    assert load_traces([f"qa={path}"], limit=1) == [expected]
    with pytest.raises(ValueError, match="line 2: no 'answer'"):
        load_traces([f"qa={path}"])


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"question": "q", "answer": "a", "domain": "x"}\n{"question": ', "line 2: not JSON"),
        ('{"question": "q", "domain": "x"}\n', "line 1: no 'answer'"),
        ('{"question": "q", "answer": "a"}\n', "line 1: no 'domain'"),
        ("[1, 2]\n", "line 1: no 'answer'"),
        ("\n\n", "no traces in it"),
    ],
)
def test_malformed_traces_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_traces([str(path)])
    assert "traces.jsonl" in str(error.value)


def test_traces_take_their_domain_from_the_flag_or_the_row_and_stop_at_the_limit(tmp_path):
    row = {"question": "q", "answer": "a", "domain": "named"}
    path = write_jsonl(tmp_path / "t.jsonl", [row] * 5)
    three = load_traces([f"math={path}"], limit=3)
    assert [trace["domain"] for trace in three] == ["math"] * 3
    assert load_traces([path]) == [row] * 5
    with pytest.raises(ValueError, match="no such file: nowhere.jsonl"):
        load_traces(["math=nowhere.jsonl"])


def test_only_sources_that_can_be_read_now_are_checked(tmp_path):
    made_later = str(tmp_path / "later.jsonl")
    check_traces(None, 1)
    check_traces([made_later, f"a={made_later}", "qa=hub:nobody/nothing"], 1, skip=[made_later])
    with pytest.raises(ValueError, match="no such file"):
        check_traces([made_later], 1)


def test_unicode_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    path = tmp_path / "t.jsonl"
    row = '{"question": "a\u2028b", "answer": "c\u0085d", "domain": "x"}\n'
    path.write_text(row, encoding="utf-8")
    assert load_traces([str(path)])[0]["question"] == "a\u2028b"
    path.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON.*utf-8"):
        load_traces([str(path)])


def test_a_trace_names_its_image_relative_to_its_file(tmp_path):
    row = {"question": "q", "answer": "a"}
    rows = [{**row, "image": "x.png"}, {**row, "image": "data:image/png;base64,AA"}, row]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    in_a_file, embedded, without = load_traces([f"box={path}"])
    assert in_a_file["image"] == str(tmp_path / "x.png")
    assert embedded["image"] == rows[1]["image"]
    assert "image" not in without


# ---- images -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    """The untrained model of the drawn scenes, what reads for it, and traces with pictures."""

    @dataclass
    class Scenes:
        model: object
        reader: Reader
        traces: list

    model = drawn_scenes.make_model(seed=1).eval()
    return Scenes(model, drawn_scenes.make_reader(), drawn_scenes.make_traces(60, seed=0))


def picture(width, height, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_patches_are_normalised_pixels_and_merged_ones_stand_together(scenes):
    image = picture(56, 28)  # 8 x 4 patches of 7 pixels
    pixels = scenes.reader.read_image(image)
    assert pixels.grid == (1, 4, 8)
    assert pixels.patches.shape == (32, 3 * 7 * 7)

    processor = scenes.reader.image_processor
    expected = np.asarray(image, np.float32) / 255
    expected = (expected - np.float32(processor.image_mean)) / np.float32(processor.image_std)
    # the vision tower merges 2 x 2 patches that stand together: the fifth is the third of row 0
    places = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1), 4: (0, 2), 31: (3, 7)}
    for number, (row, column) in places.items():
        patch = expected[7 * row : 7 * row + 7, 7 * column : 7 * column + 7]  # [7, 7, 3]
        expected_patch = patch.transpose(2, 0, 1).flatten()
        torch.testing.assert_close(pixels.patches[number].numpy(), expected_patch)


def test_images_are_resized_to_whole_merged_patches_within_the_bounds(scenes):
    assert scenes.reader.read_image(picture(61, 47)).grid == (1, 6, 8)
    assert scenes.reader.read_image(picture(3, 3)).grid == (1, 2, 2)
    _, rows, columns = scenes.reader.read_image(picture(2000, 1000)).grid
    assert rows * columns * 7 * 7 <= 224 * 224
    with pytest.raises(ValueError, match="2100 x 10 pixels is over 200 times"):
        scenes.reader.read_image(picture(2100, 10))


def test_every_kind_of_source_is_the_same_image(tmp_path, scenes):
    image = picture(28, 28)
    path = tmp_path / "x.png"
    image.save(path)
    expected = scenes.reader.read_image(image).patches
    for source in (str(path), path.read_bytes(), drawn_scenes.data_uri(image)):
        assert torch.equal(scenes.reader.read_image(source).patches, expected)


def test_a_decompression_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, size in (("warned.png", (50, 30)), ("error.png", (100, 50))):
        picture(*size).save(tmp_path / name)
        with pytest.raises(ValueError, match="too large.*make it smaller"):
            open_image(str(tmp_path / name))


def test_damaged_images_are_one_sentence(tmp_path):
    whole, half = tmp_path / "whole.png", tmp_path / "half.png"
    picture(64, 64).save(whole)
    half.write_bytes(whole.read_bytes()[:3000])  # header fine, pixels cut off
    for source in (str(half), "data:image/png;base64,@@", b"nonsense"):
        with pytest.raises(ValueError, match="cannot be read"):
            open_image(source)
    with pytest.raises(ValueError, match="no such image"):
        open_image(str(tmp_path / "none.png"))


def test_each_row_stands_for_its_part_of_picture_question_and_answer(scenes, tokenizer):
    trace = scenes.traces[0]
    table = table_of(scenes.model)
    text = f"{trace['question']} {trace['answer']}"
    words = table[torch.tensor(scenes.reader.tokenizer(text)["input_ids"])]
    with torch.no_grad():
        visual = see_images(scenes.model, [scenes.reader.read_image(trace["image"])])[0]
    x = torch.cat([visual, words])
    h = pool_parts([trace], scenes.reader, scenes.model, rows=4).view(4, -1)
    torch.testing.assert_close(h[0], x[: len(x) // 4].mean(0))
    torch.testing.assert_close(h[3], x[3 * len(x) // 4 :].mean(0))

    few_words = {"question": "", "answer": "red", "domain": "box"}  # fewer than rows
    assert pool_parts([few_words], scenes.reader, scenes.model, rows=4).isfinite().all()
    without_image = {"question": trace["question"], "answer": trace["answer"], "domain": "box"}
    pooled = pool_parts([without_image], scenes.reader, scenes.model, rows=1)
    expected = mean_pool([without_image], scenes.reader.tokenizer, table)
    torch.testing.assert_close(pooled, expected)
    with pytest.raises(ValueError, match="reads text only"):
        pool_parts([trace], Reader(tokenizer), scenes.model)


def test_the_vae_of_pictures_has_a_scale_for_every_row(scenes, tmp_path):
    config = VAEConfig(out=str(tmp_path), latent=32, hidden=32, epochs=2)
    train_vae(config, scenes.traces, scenes.reader, scenes.model)
    vae = VAE.load(tmp_path)
    assert isinstance(vae.decoder, GPTDecoder)
    assert vae.decode(torch.zeros(3, 32)).shape == (3, 8 * 128)
    # visual tokens are far longer than words, and would drown them in one common scale
    scale = vae.scale.view(8, 128)
    assert len(set(scale[:, 0].tolist())) == 8
    assert torch.equal(scale, scale[:, :1].expand(8, 128))


# ---- models and readers -------------------------------------------------------------------------


@pytest.fixture(params=["text", "pictures"])
def saved(request, tmp_path, reader, scenes, model):
    """A model folder of either kind, and its model and reader."""
    if request.param == "pictures":
        model = scenes.model
        reader = scenes.reader
    model.save_pretrained(tmp_path)
    reader.save(tmp_path)
    return tmp_path, model, reader


@pytest.fixture
def log_of_transformers():
    """What transformers logs, as a list of texts."""
    texts = []

    class Keep(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    handler = Keep()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_model_and_reader_come_back_from_their_folder(saved, log_of_transformers, capfd):
    folder, model, reader = saved
    capfd.readouterr()
    loaded = load_model(str(folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight  # tied, and not missing
    assert load_model(str(folder), torch.bfloat16).dtype == torch.bfloat16

    loaded = load_reader(str(folder))
    assert loaded.tokenizer("red 7")["input_ids"] == reader.tokenizer("red 7")["input_ids"]
    assert (loaded.image_processor is None) == (reader.image_processor is None)
    if reader.image_processor is not None:
        pixels = reader.read_image(picture(61, 47))
        assert torch.equal(loaded.read_image(picture(61, 47)).patches, pixels.patches)
    assert log_of_transformers == []  # no word of torchvision
    assert capfd.readouterr().err == ""  # no bar


def test_a_model_that_lacks_a_tensor_is_refused(saved, log_of_transformers):
    folder, model, _ = saved
    name = next(name for name in model.state_dict() if "o_proj" in name)

    def drop(tensors):
        key = next(key for key in tensors if "o_proj" in key)
        del tensors[key]

    edit_weights(folder, drop)
    with pytest.raises(ValueError, match=f"cannot load the model.*lack {name}"):
        load_model(str(folder))
    assert log_of_transformers == []  # one sentence, and no table before it


def test_a_model_with_a_misshapen_tensor_is_refused(saved, log_of_transformers):
    folder, _, _ = saved

    def cut(tensors):
        key = next(key for key in tensors if "o_proj" in key)
        tensors[key] = tensors[key][:5].contiguous()

    edit_weights(folder, cut)
    with pytest.raises(ValueError, match=r"o_proj.weight is \[5, 128\], in the model \[128, 128\]"):
        load_model(str(folder))
    assert log_of_transformers == []


def test_pickled_weights_are_refused(saved):
    folder, model, _ = saved
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the model.*safetensors") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def test_code_beside_a_model_is_never_run(saved):
    folder, _, _ = saved
    mark = folder / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = read_json(folder / "config.json")
    config["model_type"] = "unheard-of"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_reader):
        with pytest.raises(ValueError, match="cannot load the model"):
            load(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "qwen3", "hidden_size": "wide"}'])
def test_a_folder_that_is_no_model_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for load in (load_model, load_reader):
        with pytest.raises(ValueError, match="cannot load the model") as error:
            load(str(tmp_path))
        assert "\n" not in str(error.value)


def test_the_image_processor_of_another_family_is_refused(tmp_path, scenes):
    scenes.model.save_pretrained(tmp_path)
    scenes.reader.save(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CLIPImageProcessor.* is not that of a Qwen2-VL"):
        load_reader(str(tmp_path))


# ---- what every script shares -------------------------------------------------------------------


@dataclass
class Settings:
    """A dataclass as the scripts have it."""

    steps: int = HfArg(default=60, help="batches of rollouts")
    lr: float = HfArg(default=0.5, help="the rate")
    kind: Literal["a", "b"] = HfArg(default="a", help="a kind")
    way: Literal["up", "down"] | None = HfArg(default=None, help="a way")
    words: list[str] | None = HfArg(default=None, help="words (default: all)")
    top_k: int | None = HfArg(default=None, help="a count")
    shuffle: bool = HfArg(default=False, help="a switch")
    slots: int = HfArg(default=64, help="rows decoded at a time", compare=False)

    def __post_init__(self):
        require_at_least(self, steps=1, lr=0, top_k=1)
        require_choices(self)


def test_settings_are_read_from_flags_with_dashes_or_underscores():
    assert parse_settings(Settings, "doc", []) == Settings()
    argv = [
        "--steps",
        "3",
        "--lr",
        "1e-6",
        "--kind",
        "b",
        "--words",
        "x",
        "y",
        "--top-k",
        "4",
        "--shuffle",
        "--slots",
        "2",
    ]
    expected = Settings(3, 1e-6, "b", None, ["x", "y"], 4, True, 2)
    settings = parse_settings(Settings, "doc", argv)
    assert settings == expected and settings.slots == 2
    assert parse_settings(Settings, "doc", ["--top_k", "4"]) == Settings(top_k=4)


def test_help_keeps_the_lines_of_the_doc_and_ends_in_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(Settings, "What it is.\n    python script.py --steps 3\n", ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "What it is.\n    python script.py --steps 3\n" in text
    assert "batches of rollouts (default: 60)" in text
    assert "words (default: all)\n" in text
    assert "a count\n" in text  # no "(default: None)"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--step", "3"], "unrecognized arguments: --step 3"),
        (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
        (["--kind", "c"], "--kind: invalid choice: 'c'"),
        (["--words"], "--words: expected at least one argument"),
    ],
)
def test_a_flag_that_cannot_be_read_is_one_sentence_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(Settings, "doc", argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--top-k", "0"], "--top-k must be at least 1, not 0"),
        (["--lr", "-0.1"], "--lr must be at least 0, not -0.1"),
        (["--lr", "nan"], "--lr must be at least 0, not nan"),
        (["--lr", "inf"], "--lr must be at least 0 and finite, not inf"),
    ],
)
def test_a_number_out_of_range_is_one_sentence(argv, message):
    with pytest.raises(ValueError) as error:
        parse_settings(Settings, "doc", argv)
    assert str(error.value) == message


def test_a_choice_is_checked_from_python_too():
    for _ in range(2):
        with pytest.raises(ValueError, match="--kind must be one of a, b, not 'c'"):
            Settings(kind="c")
        with pytest.raises(ValueError, match="--way must be one of up, down, not 'left'"):
            Settings(way="left")
        assert Settings(way=None) == Settings()
        parse_settings(Settings, "doc", ["--way", "up"])  # which changes the types of the fields
    with pytest.raises(ValueError, match="--decoder must be one of mlp, gpt, not 'rnn'"):
        VAEConfig(decoder="rnn")


def test_result_settings_leave_out_what_changes_no_result():
    settings = result_settings(Settings(words=["x"], slots=2))
    assert settings == {
        "steps": 60,
        "lr": 0.5,
        "kind": "a",
        "way": None,
        "words": ["x"],
        "top_k": None,
        "shuffle": False,
    }
    # they equal what is read back from a file, whatever the Python values were
    assert result_settings(Settings(words=("x",))) == settings


def test_require_same_names_every_setting_that_changed():
    require_same("runs/x was made", {"a": 1}, {"a": 1}, "--overwrite")
    with pytest.raises(ValueError) as error:
        require_same("runs/x was made", {"a": 1, "b": 2}, {"a": 3, "c": None, "b": 1}, "--resume")
    expected = "runs/x was made with another a, b (was 1, now 3): choose another --out, or --resume"
    assert str(error.value) == expected


def test_files_are_replaced_in_one_step(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, '{"a": 1}')
    write_text(path, '{"a": 2}')
    assert read_json(path) == {"a": 2}
    assert os.listdir(tmp_path) == ["x.json"]
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match="x.json is damaged.*choose another --out"):
        read_json(path)


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("a sentence\n  in two lines"), "script.py: a sentence in two lines"),
        (FileNotFoundError("no such file"), "script.py: no such file"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_bad_input_ends_a_script_in_one_sentence(error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main, "script.py")
    assert stop.value.code == code
