"""Vision-language models: pictures, positions, decoder and log-probs against plain transformers,
grounding tasks, the GPT prefix decoder, the whole path.

Random small models, nothing is pretrained or downloaded; about 30 s on one core.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import bench_tiny_vl
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import drawn_scenes
import grpo
import sft
import tiny_world
from prefix import (
    Decoder,
    Palette,
    Prompt,
    Sampling,
    completion_logprobs,
    embed_rows,
    generate_plainly,
    generator_of,
    load_policy,
    prompt_of,
    rotary_positions,
)
from rewards import load_task, parse_box
from sft import (
    PrefixDraws,
    Ranks,
    SFTConfig,
    apply_gradients,
    lm_step,
    load_reference,
    load_trainable,
    make_optimizer,
    posterior_of,
    seed_of,
)
from vae import (
    VAE,
    GPTDecoder,
    Reader,
    VAEConfig,
    load_reader,
    load_traces,
    mean_pool,
    open_image,
    pool_parts,
    see_images,
    train_vae,
)

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY_SIZE, WIDTH = 80, 64
VISION_START, VISION_END, IMAGE_TOKEN = 3, 4, 5
END_TOKENS = [2, *range(12, VOCABULARY_SIZE, 7)]  # many: random completions end at many lengths
NAMES = ["qwen2_5_vl", "qwen2_vl"]


def build(name="qwen2_5_vl"):
    """A random model in which biases, norms and each of the three position axes matter."""
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": END_TOKENS,
        "pad_token_id": 0,
        "initializer_range": 0.15,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [2, 3, 3],
        },
    }
    tokens = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 6,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    vision = {"num_heads": 2, "patch_size": 7, "temporal_patch_size": 2}
    if name == "qwen2_vl":
        vision |= {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
        model = Qwen2VLForConditionalGeneration(config)
    else:
        vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": WIDTH}
        vision |= {"window_size": 28, "fullatt_block_indexes": [1], "initializer_range": 0.15}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        model = Qwen2_5_VLForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def small_reader():
    bounds = {"shortest_edge": 196, "longest_edge": 50176}
    return Reader(None, Qwen2VLImageProcessorPil(patch_size=7, temporal_patch_size=2, size=bounds))


def picture(width, height, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SIZES = [(56, 56), (84, 28), None, (28, 70), (14, 14)]  # of the pictures; one prompt has none


def make_prompts():
    """Prompts with pictures of several sizes, and words before and behind them."""
    rng = torch.Generator().manual_seed(1)
    reader = small_reader()
    prompts = []
    for i, size in enumerate(SIZES):
        before = torch.randint(12, VOCABULARY_SIZE, (1 + i,), generator=rng).tolist()
        behind = torch.randint(12, VOCABULARY_SIZE, (5 - i,), generator=rng).tolist()
        if size is None:
            prompts.append(Prompt(before + behind))
            continue
        image = reader.read_image(picture(*size, seed=i))
        visual = [IMAGE_TOKEN] * (len(image.patches) // 4)
        ids = [*before, VISION_START, *visual, VISION_END, *behind]
        prompts.append(Prompt(ids, image))
    return prompts


def make_prefixes():
    """A prefix of its own length for every other prompt."""
    rng = torch.Generator().manual_seed(2)
    prefixes = []
    for i in range(len(SIZES)):
        if i % 2 == 1:
            prefixes.append(0.5 * torch.randn(3 + i, WIDTH, generator=rng))
        else:
            prefixes.append(None)
    return prefixes


def reference_inputs(model, prompt, prefix, completion=()):
    """(embeddings [1, T, d], positions [3, 1, T]) of one row, through transformers' own calls."""
    ids = torch.tensor([[*prompt.ids, *completion]])  # [1, T - L]
    in_prompt = torch.arange(ids.shape[1]) < len(prompt.ids)
    is_visual = (ids == IMAGE_TOKEN) & in_prompt  # one that the model writes is just a word
    x = model.get_input_embeddings()(ids)
    grid = None
    if prompt.image is not None:
        grid = torch.tensor([prompt.image.grid])
        features = model.model.get_image_features(prompt.image.patches, grid)
        x = x.masked_scatter(is_visual[:, :, None], torch.cat(list(features.pooler_output)))
    positions, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=is_visual.int(),
        image_grid_thw=grid,
        attention_mask=torch.ones_like(ids),
    )
    if prefix is None:
        return x, positions
    length = len(prefix)
    before = torch.arange(length).expand(3, 1, length)
    return torch.cat([prefix[None], x], 1), torch.cat([before, positions + length], 2)


# ---- pictures -----------------------------------------------------------------------------------

HUB_SETTINGS = {  # of Qwen2.5-VL's preprocessor_config.json, as it is on the hub
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


@pytest.fixture(scope="module")
def settings_folder(tmp_path_factory):
    """A model folder without weights, to which a test adds a preprocessor_config.json."""
    folder = tmp_path_factory.mktemp("settings")
    drawn_scenes.make_model().config.save_pretrained(folder)
    tiny_world.make_tokenizer(drawn_scenes.VOCABULARY).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 7, "temporal_patch_size": 1, "min_pixels": 196, "max_pixels": 50176},
        {"max_pixels": 6000, "image_mean": [0.5] * 3, "image_std": [0.4] * 3},
    ],
)
def test_pictures_go_through_transformers_pillow_processor(settings_folder, changes):
    settings = {**HUB_SETTINGS, **changes}
    (settings_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    reader = load_reader(str(settings_folder))
    del settings["image_processor_type"], settings["processor_class"]
    theirs = Qwen2VLImageProcessorPil(**settings)
    for i, size in enumerate([(56, 56), (61, 47), (28, 28), (300, 90), (200, 210)]):
        image = picture(*size, seed=i)
        expected = theirs(images=image, return_tensors="pt")
        pixels = reader.read_image(image)
        assert expected["image_grid_thw"].tolist() == [list(pixels.grid)]
        assert torch.equal(expected["pixel_values"], pixels.patches)


def test_a_saved_reader_reads_the_same(settings_folder, tmp_path):
    reader = drawn_scenes.make_reader()
    drawn_scenes.make_model().config.save_pretrained(tmp_path)
    reader.save(tmp_path)
    again = load_reader(str(tmp_path))
    image = picture(61, 47)
    pixels = reader.read_image(image)
    assert torch.equal(again.read_image(image).patches, pixels.patches)
    assert again.read_image(image).grid == pixels.grid
    assert again.tokenizer.get_vocab() == reader.tokenizer.get_vocab()


def test_a_decompression_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, size in (("warned.png", (50, 30)), ("error.png", (100, 50))):
        picture(*size).save(tmp_path / name)
        with pytest.raises(ValueError, match="too large.*make it smaller"):
            open_image(str(tmp_path / name))
        path = write_rows(tmp_path, {"image": name, "expression": "x", "bbox": [0, 0, 9, 9]})
        with pytest.raises(ValueError, match="cannot be used.*decompression bomb"):
            load_task("grounding", test=path, splits=("test",))


def test_damaged_pictures_are_one_sentence(tmp_path):
    picture(64, 64).save(tmp_path / "whole.png")
    header_and_some = (tmp_path / "whole.png").read_bytes()[:3000]
    (tmp_path / "half.png").write_bytes(header_and_some)
    for source, message in (
        (str(tmp_path / "half.png"), "cannot be read"),
        ("data:image/png;base64,@@", "cannot be read"),
        (str(tmp_path / "none.png"), "no such image"),
        (b"nonsense", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            open_image(source)
    with pytest.raises(ValueError, match="over 200 times"):
        small_reader().read_image(picture(2100, 10))


# ---- positions ----------------------------------------------------------------------------------


def test_a_picture_stands_at_one_time_and_the_text_goes_on_after_its_longer_side():
    """arXiv 2409.12191, Sec. 2.1, written out for a picture of 2 x 3 visual tokens."""
    image = small_reader().read_image(picture(42, 28))
    prompt = Prompt([20, VISION_START, *[IMAGE_TOKEN] * 6, VISION_END, 21], image)
    positions = rotary_positions(build(), prompt, length=1, new=2)
    time = [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9]
    row = [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9]
    column = [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9]
    assert positions.tolist() == [time, row, column]


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_those_of_get_rope_index(name):
    model = build(name)
    prompts = make_prompts()
    prefixes = make_prefixes()
    table = model.get_input_embeddings().weight
    rows = embed_rows(model, table, prompts, prefixes)
    for row, prompt, prefix in zip(rows, prompts, prefixes):
        x, positions = reference_inputs(model, prompt, prefix)
        torch.testing.assert_close(torch.cat([row.prefix, row.prompt]), x[0])
        assert torch.equal(row.positions, positions[:, 0])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_a_prefix_log_probs_are_those_of_the_modules_own_forward(name):
    """From pixels and ids alone: embeddings and positions are all transformers' own."""
    model = build(name)
    completion = [20, 33, 2]
    for prompt in make_prompts():
        if prompt.image is None:
            continue
        ids = torch.tensor([prompt.ids + completion])
        output = model(
            input_ids=ids,
            mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
            pixel_values=prompt.image.patches,
            image_grid_thw=torch.tensor([prompt.image.grid]),
        )
        logprobs = output.logits[0, -4:-1].log_softmax(-1)  # [3, V]
        expected = logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
        scored, _ = completion_logprobs(model, [prompt], [completion], [None])
        torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)


# ---- decoder and log-probs ----------------------------------------------------------------------


def decode(model, prompts, prefixes, sampling, seeds=None, **options):
    decoder = Decoder(model, **options)
    return decoder.generate(decoder.embed(prompts, prefixes), sampling, seeds)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fixed", [False, True], ids=["eager", "fixed-shapes"])
def test_greedy_decoding_equals_generate(name, fixed):
    """Several picture sizes and a text row in one batch, with and without prefix, fewer slots
    than rows."""
    model = build(name)
    prompts = make_prompts()
    prefixes = make_prefixes()
    decoder = Decoder(model, slots=3)
    decoder.fixed = fixed
    completions = decoder.generate(decoder.embed(prompts, prefixes), Sampling(0, max_new_tokens=24))
    for prompt, prefix, completion in zip(prompts, prefixes, completions):
        x, positions = reference_inputs(model, prompt, prefix)
        columns = torch.arange(x.shape[1]).expand(1, 1, -1)
        expected = model.generate(
            inputs_embeds=x,
            attention_mask=torch.ones(x.shape[:2]),
            position_ids=torch.cat([columns, positions]),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=END_TOKENS,
            pad_token_id=0,
        )
        assert completion.ids == expected[0].tolist()
    assert len({len(completion.ids) for completion in completions}) > 1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sampled_log_probs_are_those_of_the_module(name):
    """Those that the decoder notes, and those that training scores."""
    model = build(name)
    prompts = make_prompts()
    prefixes = make_prefixes()
    completions = decode(model, prompts, prefixes, Sampling(max_new_tokens=16), seeds=range(5))
    ids = [completion.ids for completion in completions]
    scored, _ = completion_logprobs(model, prompts, ids, prefixes)
    scored = scored.split([len(row) for row in ids])
    for prompt, prefix, completion, logprobs in zip(prompts, prefixes, completions, scored):
        n = len(completion.ids)
        x, positions = reference_inputs(model, prompt, prefix, completion.ids)
        logits = model(inputs_embeds=x, position_ids=positions).logits[0, -n - 1 : -1]  # [n, V]
        picked = torch.tensor(completion.ids)[:, None]
        expected = logits.log_softmax(-1).gather(1, picked)[:, 0]
        noted = torch.tensor(completion.logprobs)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(noted, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_decoder_samples_what_the_plain_one_does(name):
    model = build(name)
    sampling = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=12)
    seeds = [7, 8, 9, 10, 11]
    decoder = Decoder(model, slots=3)
    rows = decoder.embed(make_prompts(), make_prefixes())
    fast = decoder.generate(rows, sampling, seeds)
    plain = generate_plainly(model, rows, sampling, seeds, END_TOKENS)
    for completion, expected in zip(fast, plain):
        assert completion.ids == expected.ids
        assert completion.finish == expected.finish
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_row_with_a_picture_does_not_depend_on_its_batch():
    model = build()
    prompts = make_prompts()
    prefixes = make_prefixes()
    sampling = Sampling(max_new_tokens=16)
    together = decode(model, prompts, prefixes, sampling, seeds=range(5))
    for i in range(5):
        alone = decode(model, [prompts[i]], [prefixes[i]], sampling, seeds=[i])[0]
        assert alone.ids == together[i].ids
        with torch.no_grad():
            scored, _ = completion_logprobs(model, [prompts[i]], [alone.ids], [prefixes[i]])
        noted = torch.tensor(together[i].logprobs)
        torch.testing.assert_close(scored, noted, atol=1e-5, rtol=0)


def test_a_group_shares_its_prefill_but_not_with_another_picture(monkeypatch):
    prefilled = []
    original = Decoder._prefill

    def note_rows(decoder, first, rows):
        prefilled.extend(rows)
        return original(decoder, first, rows)

    monkeypatch.setattr(Decoder, "_prefill", note_rows)
    reader = small_reader()
    ids = [VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, 20, 21]
    one = Prompt(ids, reader.read_image(picture(28, 28, seed=1)))
    other = Prompt(ids, reader.read_image(picture(28, 28, seed=2)))
    prompts = [one] * 3 + [other] * 3
    completions = decode(build(), prompts, None, Sampling(0, max_new_tokens=12), eos_ids=[])
    assert len(prefilled) == 2
    assert completions[0].ids == completions[2].ids
    assert completions[3].ids == completions[5].ids
    assert completions[2].ids != completions[3].ids


def test_a_prompt_is_seen_once_however_often_it_is_asked(monkeypatch):
    reader = small_reader()
    ids = [VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, 20]
    prompt = Prompt(ids, reader.read_image(picture(28, 28)))
    model = build()
    calls = []

    def note_call(tower, inputs, output):
        calls.append(output)

    model.model.visual.register_forward_hook(note_call)
    Decoder(model).embed([prompt] * 4)
    assert len(calls) == 1


def test_gradients_reach_text_weights_and_prefix_but_not_a_frozen_tower():
    model = build()
    model.model.visual.requires_grad_(False)
    prefixes = make_prefixes()
    for prefix in prefixes:
        if prefix is not None:
            prefix.requires_grad_()
    completions = [[20, 30, 21]] * 5
    logprobs, _ = completion_logprobs(model, make_prompts(), completions, prefixes)
    logprobs.sum().backward()
    assert prefixes[1].grad.abs().sum() > 0
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.model.visual.parameters())


def test_rollouts_that_share_a_picture_compute_it_once_and_score_the_same():
    """Both kinds of groups: unguided, and under one prefix; rotary positions have three axes."""
    model = build()
    widths = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, arguments: widths.append(arguments[0].shape[:2].numel())
    )
    prompts, prefixes, completions = [], [], []
    for prompt, prefix in zip(make_prompts(), make_prefixes()):
        for i in range(3):
            prompts.append(prompt)
            prefixes.append(prefix)
            completions.append([20, 30, 21, 22][i:])
    weights = list(model.model.language_model.parameters())

    shared, _ = completion_logprobs(model, prompts, completions, prefixes)
    plain, _ = completion_logprobs(model, prompts, completions, prefixes, share=False)
    assert widths[0] < 0.7 * widths[1]
    assert (shared - plain).abs().max() < 1e-5
    factors = torch.linspace(-1, 1, len(plain))
    gradients = torch.autograd.grad((shared * factors).sum(), weights)
    expected = torch.autograd.grad((plain * factors).sum(), weights)
    for gradient, other in zip(gradients, expected):
        assert (gradient - other).abs().max() <= 1e-5 * max(1, other.abs().max())


@torch.no_grad()
def test_an_image_token_that_the_policy_writes_is_only_a_token():
    model = build()
    prompts = make_prompts()
    prefixes = make_prefixes()
    completion = [20, IMAGE_TOKEN, 21]
    scored, _ = completion_logprobs(model, prompts, [completion] * 5, prefixes)
    for prompt, prefix, logprobs in zip(prompts, prefixes, scored.split(3)):
        x, positions = reference_inputs(model, prompt, prefix, completion)
        logits = model(inputs_embeds=x, position_ids=positions).logits[0, -4:-1]
        picked = torch.tensor(completion)[:, None]
        expected = logits.log_softmax(-1).gather(1, picked)[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


def test_prompt_and_picture_must_belong_together():
    model = build()
    prompts = make_prompts()
    without_image = [Prompt(prompt.ids) for prompt in prompts]
    with_another = [Prompt(prompt.ids, prompts[0].image) for prompt in prompts]
    without_words = [Prompt([*prompts[2].ids, IMAGE_TOKEN])]
    for broken in (without_image, with_another, without_words):
        with pytest.raises(ValueError, match="image tokens, its image makes"):
            Decoder(model).embed(broken)


# ---- grounding rows -----------------------------------------------------------------------------


def write_rows(folder, *rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    return str(folder / "rows.jsonl")


def test_grounding_rows_state_their_unit(tmp_path):
    picture(100, 50).save(tmp_path / "a.png")
    path = write_rows(
        tmp_path, {"image": "a.png", "expression": "the cat", "bbox": [10, 5, 60, 50]}
    )
    (row,) = load_task("grounding", test=path, splits=("test",)).test
    assert parse_box(row["answer"]) == (10, 5, 60, 50)
    assert "the cat" in row["question"]
    assert "100 wide and 50 high" in row["question"]

    (row,) = load_task("refcoco:1000", test=path, splits=("test",)).test
    assert parse_box(row["answer"]) == (100, 100, 600, 1000)
    assert "thousandths" in row["question"]


def test_an_unknown_unit_and_missing_rows_are_refused(tmp_path):
    picture(100, 50).save(tmp_path / "a.png")
    path = write_rows(tmp_path, {"image": "a.png", "expression": "x", "bbox": [10, 5, 60, 50]})
    with pytest.raises(ValueError, match="unknown unit"):
        load_task("refcoco:7", test=path, splits=("test",))
    with pytest.raises(ValueError, match="no train rows.*bbox"):
        load_task("refcoco", test=path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": "none.png"}, "line 1: no such image"),
        ({"image": "bad.png"}, "line 1: the image .*bad.png cannot be used"),
        ({"bbox": [0, 0, 200, 10]}, "is no .*inside the image of 100 x 50"),
        ({"bbox": [5, 5, 5, 10]}, "is no "),
        ({"bbox": "5 5"}, "is no "),
        ({"bbox": [0, 0, "a", 1]}, "is no "),
        ({"expression": ""}, "no 'expression'"),
    ],
)
def test_bad_grounding_rows_are_one_sentence(tmp_path, changes, message):
    picture(100, 50).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and so on")
    row = {"image": "a.png", "expression": "x", "bbox": [0, 0, 1, 1], **changes}
    with pytest.raises(ValueError, match=message):
        load_task("grounding", test=write_rows(tmp_path, row), splits=("test",))


def test_a_trace_names_its_picture_relative_to_its_file(tmp_path):
    with_picture = {"question": "q", "answer": "a", "image": "x.png"}
    path = write_rows(tmp_path, with_picture, {"question": "q", "answer": "a"})
    first, second = load_traces([f"box={path}"])
    assert first["image"] == str(tmp_path / "x.png")
    assert "image" not in second


# ---- the GPT prefix decoder and its VAE ---------------------------------------------------------


@torch.no_grad()
def test_the_gpt_decoder_is_causal_and_batches_like_single_rows():
    torch.manual_seed(0)
    decoder = GPTDecoder(width=6, latent=32, hidden=16, rows=8).eval()
    z = torch.randn(5, 32)
    rows = decoder(z).view(5, 8, 6)
    later_parts = z.clone()
    later_parts[:, 12:] += 1  # parts 3 to 7 of 8
    changed = decoder(later_parts).view(5, 8, 6)
    torch.testing.assert_close(changed[:, :3], rows[:, :3])
    difference = (changed[:, 3:] - rows[:, 3:]).abs()  # [5, 5, 6]
    assert difference.amax((0, 2)).min() > 1e-4
    one_by_one = [decoder(one[None]) for one in z]
    torch.testing.assert_close(torch.cat(one_by_one), rows.flatten(1))
    with pytest.raises(ValueError, match="multiple of 8"):
        GPTDecoder(width=6, latent=30, hidden=16, rows=8)


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    """An untrained tiny-vl policy folder, its traces, and a VAE with the GPT decoder on them."""
    folder = tmp_path_factory.mktemp("vl")
    model = drawn_scenes.make_model(seed=1).eval()
    reader = drawn_scenes.make_reader()
    model.save_pretrained(folder / "policy")
    reader.save(folder / "policy")
    traces = drawn_scenes.make_traces(60, seed=0)
    config = VAEConfig(out=str(folder / "vae"), decoder="gpt", latent=32, hidden=32, epochs=4)
    train_vae(config, traces, reader, model)
    return SimpleNamespace(
        policy=str(folder / "policy"),
        vae=str(folder / "vae"),
        model=model,
        reader=reader,
        traces=traces,
        table=model.get_input_embeddings().weight.detach(),
    )


@torch.no_grad()
def test_parts_of_picture_question_and_answer_are_pooled_in_this_order(vl):
    trace = vl.traces[0]
    ids = vl.reader.tokenizer(f"{trace['question']} {trace['answer']}")["input_ids"]
    visual = see_images(vl.model, [vl.reader.read_image(trace["image"])])[0]
    x = torch.cat([visual, vl.table[ids]])  # [T, d]
    h = pool_parts([trace], vl.reader, vl.model, rows=4).view(4, -1)
    torch.testing.assert_close(h[0], x[: len(x) // 4].mean(0))
    torch.testing.assert_close(h[3], x[3 * len(x) // 4 :].mean(0))


def test_pooled_text_in_one_part_is_the_mean_of_the_paper(vl):
    trace = {key: value for key, value in vl.traces[0].items() if key != "image"}
    pooled = pool_parts([trace], vl.reader, vl.model, rows=1)
    torch.testing.assert_close(pooled, mean_pool([trace], vl.reader.tokenizer, vl.table))
    with pytest.raises(ValueError, match="reads text only"):
        pool_parts(vl.traces[:1], Reader(vl.reader.tokenizer), vl.model)


def test_every_prefix_row_has_a_scale_of_its_own(vl):
    """Visual tokens are far longer than words, and would drown them in one common scale."""
    vae = VAE.load(vl.vae)
    scales = vae.scale.view(8, 128)
    assert len(set(scales[:, 0].tolist())) == 8
    assert torch.equal(scales, scales[:, :1].expand(8, 128))


def test_one_latent_makes_eight_prefix_rows(vl):
    vae = VAE.load(vl.vae)
    prefix = Palette(vae, vl.table, "prior", length=8).draw(5)
    assert prefix.embeddings.shape == (8, 128)
    assert prefix.latent.shape == (1, 32)
    torch.testing.assert_close(prefix.embeddings.flatten(), vae.decode(prefix.latent)[0])

    short = Palette(vae, vl.table, length=3, z=prefix.latent).draw(0).embeddings
    long = Palette(vae, vl.table, length=16, z=prefix.latent).draw(0).embeddings
    assert torch.equal(short, prefix.embeddings[:3])
    assert torch.equal(long, torch.cat([prefix.embeddings, prefix.embeddings]))


def test_independent_latents_and_the_gaussian_control_make_eight_rows_a_draw(vl):
    vae = VAE.load(vl.vae)
    two = Palette(vae, vl.table, "box", length=16, tiled=False).draw(0)
    assert two.latent.shape == (2, 32)
    assert not torch.equal(two.embeddings[:8], two.embeddings[8:])
    gauss = Palette(vae, vl.table, "gauss", length=8).draw(0).embeddings
    assert gauss.shape == (8, 128)
    assert not torch.equal(gauss[0], gauss[1])


def test_a_picture_and_its_answer_have_the_latent_of_their_eight_parts(vl):
    """The posterior of a trace with a picture, by the GPT decoder: one z makes eight rows."""
    vae = VAE.load(vl.vae)
    posterior = posterior_of(vl.traces[:3], vl.reader, vl.model, vl.table, vae)
    mu, log_var = vae.encode(pool_parts(vl.traces[:3], vl.reader, vl.model, rows=8))
    torch.testing.assert_close(posterior.mu, mu)
    torch.testing.assert_close(posterior.sigma, torch.exp(log_var / 2))

    other_picture = [{**vl.traces[0], "image": vl.traces[1]["image"]}]
    changed = posterior_of(other_picture, vl.reader, vl.model, vl.table, vae)
    assert not torch.allclose(changed.mu[0], mu[0])

    config = SFTConfig(
        model="m", vae="v", traces=["t"], out="o", source="posterior", lengths=[3, 8]
    )
    draws = PrefixDraws(vae, vl.table, config, posterior)
    prefixes = [draws.draw(step=0, row=row, number=2) for row in range(20)]
    assert {len(prefix) for prefix in prefixes} == {3, 8}
    z = mu[2] + posterior.sigma[2] * torch.randn(
        32, generator=generator_of(seed_of(0, "sft prefix", 0, 5))
    )
    rows = vae.decode(z).view(8, 128)
    torch.testing.assert_close(prefixes[5], rows[: len(prefixes[5])], atol=1e-4, rtol=1e-3)


def test_a_warm_up_on_pictures_from_the_posterior_measures_control(vl, tmp_path, capsys):
    lines = [json.dumps(trace) + "\n" for trace in vl.traces]
    (tmp_path / "traces.jsonl").write_text("".join(lines))
    config = SFTConfig(
        model=vl.policy,
        vae=vl.vae,
        traces=[str(tmp_path / "traces.jsonl")],
        out=str(tmp_path / "run"),
        source="posterior",
        steps=1,
        batch=4,
        device="cpu",
    )
    run = sft.train(config)
    assert json.loads((run.folder / "config.json").read_text())["lengths"] == [8]
    assert "after the warm-up: prefixes " in capsys.readouterr().out


def test_the_table_of_the_tutorial_is_the_measured_one():
    measured = json.loads((ROOT / "tests" / "tiny_vl.json").read_text())
    tutorial = (ROOT / "tutorials" / "09_grounding_with_a_palette.md").read_text()
    behind_start = tutorial.split(bench_tiny_vl.START)[1]
    shown = behind_start.split(bench_tiny_vl.END)[0].strip()
    assert bench_tiny_vl.page(measured["figures"], measured["note"]) == shown


# ---- the whole path -----------------------------------------------------------------------------


def test_a_policy_folder_is_standard_and_its_vision_tower_is_frozen(vl):
    model, _ = load_policy(vl.policy)
    settings = json.loads(Path(vl.policy, "preprocessor_config.json").read_text())
    assert settings["patch_size"] == 7
    assert not any(parameter.requires_grad for parameter in model.model.visual.parameters())
    assert any(parameter.requires_grad for parameter in model.model.language_model.parameters())


def test_a_prompt_holds_the_picture_before_the_question(vl):
    row = drawn_scenes.load("test")[0]
    prompt = prompt_of(row, vl.reader)
    words = vl.reader.tokenizer.convert_ids_to_tokens(prompt.ids)
    visual = ["<|vision_start|>", *["<|image_pad|>"] * 16, "<|vision_end|>"]
    assert words == ["<q>", *visual, *row["question"].split(), "<a>"]
    assert prompt.image.grid == (1, 8, 8)

    text = prompt_of({"question": "box"}, vl.reader)
    assert text.ids == vl.reader.tokenizer("<q> box <a>")["input_ids"]
    assert text.image is None
    with pytest.raises(ValueError, match="reads text only"):
        prompt_of(row, tiny_world.make_reader())


@pytest.mark.parametrize(
    "checkpointing, precision", [(False, "fp32"), (True, "fp32"), (False, "bf16")]
)
def test_training_leaves_the_vision_tower_alone_and_a_reference_shares_it(
    vl, checkpointing, precision
):
    ranks = Ranks.alone()
    config = SimpleNamespace(precision=precision, checkpointing=checkpointing)
    model, reader = load_trainable(vl.policy, ranks, config)
    reference = load_reference(vl.policy, model, ranks, config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    pairs = []
    for trace in vl.traces[:3]:
        answer = reader.tokenizer(trace["answer"], add_special_tokens=False)["input_ids"]
        pairs.append((prompt_of(trace, reader), answer))
    lm_step(model, pairs, [None] * 3, ranks)
    apply_gradients(model, [make_optimizer(model, 1e-3)], ranks)

    for (name, trained), kept in zip(model.named_parameters(), reference.parameters()):
        is_visual = ".visual." in name
        dtype = torch.float32
        if precision == "bf16" and not is_visual:
            dtype = torch.bfloat16
        assert torch.equal(trained, before[name]) == is_visual, name
        assert torch.equal(kept, before[name].to(kept.dtype)), name
        assert kept.dtype == dtype
        assert (trained.data_ptr() == kept.data_ptr()) == is_visual
        assert not kept.requires_grad


def test_pretraining_warm_up_rl_and_arms_run_and_are_found_done(tmp_path, monkeypatch):
    """Every stage of `grpo.py --model tiny-vl`, hardly trained; then again."""
    thirty_traces = drawn_scenes.make_traces(30, seed=0)
    monkeypatch.setattr(drawn_scenes, "make_traces", lambda n, seed: thirty_traces)
    monkeypatch.setattr(drawn_scenes, "TRAIN_QUESTIONS", 40)
    monkeypatch.setattr(drawn_scenes, "TEST_QUESTIONS", 40)
    flags = ["--model", "tiny-vl", "--out", str(tmp_path), "--base-steps", "2", "--steps", "2"]
    flags += ["--schedule", "two-phase", "--prompts", "2", "--group", "2", "--eval-questions", "4"]
    flags += ["--device", "cpu"]
    grpo.main([*flags, "--closing-questions", "2"])
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    arms = {"greedy", "sampling", "noise", "gauss", "latent", "latent + sampling"}
    assert {*arms, "box", "prose", "place"} <= set(results["arms"])
    assert Image.open(tmp_path / "evaluation" / "boxes.png").size[0] > 168

    metrics = tmp_path / "grpo-two-phase-s0" / "metrics.jsonl"
    before = metrics.read_text()
    grpo.main([*flags, "--closing-questions", "0"])
    assert metrics.read_text() == before
