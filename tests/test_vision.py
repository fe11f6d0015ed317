"""The vision-language variant: images, positions, decoder and log-probs against plain transformers, tasks, the prefix decoder.

Random small models, nothing is pretrained or downloaded; about 15 s on one core.
"""
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration)

import prefix as prefix_module
from prefix import Decoder, Palette, Prompt, Sampling, completion_logprobs, load_policy, prompt_of, rope_positions
from rewards import (VL_STYLES, GroundingTask, box_iou, load_task, parse_box, tiny_scene, tiny_scene_answer, tiny_scene_style,
                     tiny_scene_traces)
from sft import (Ranks, apply_gradients, lm_step, load_reference, load_trainable, make_optimizer, tiny_vl_model, tiny_vl_processor)
from vae import VAE, GPTDecoder, Processor, load_traces, mean_pool, open_image, pool_parts, see_images, train_vae

IMAGE_TOKEN, START, STOP, EOS, WIDTH = 5, 3, 4, (2, *range(12, 80, 7)), 64


def build(name="qwen2_5_vl"):
    """A random model in which biases, norms and each of the three position axes matter."""
    torch.manual_seed(0)
    text = dict(vocab_size=80, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=list(EOS), pad_token_id=0,
                initializer_range=0.15,
                rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[2, 3, 3]))
    tokens = dict(image_token_id=IMAGE_TOKEN, video_token_id=6, vision_start_token_id=START, vision_end_token_id=STOP)
    if name == "qwen2_vl":
        vision = dict(depth=1, embed_dim=32, hidden_size=WIDTH, num_heads=2, mlp_ratio=2, patch_size=7, temporal_patch_size=2)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))
    else:
        vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=7, temporal_patch_size=2,
                      window_size=28, fullatt_block_indexes=[1], out_hidden_size=WIDTH, initializer_range=0.15)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p) if p.dim() == 1 else 0
    return model.eval()


def processor():
    return Processor(None, patch_size=7, temporal_patch_size=2, size=dict(shortest_edge=196, longest_edge=50176))


def picture(width, height, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


def rows(sizes=((56, 56), (84, 28), None, (28, 70), (14, 14))):
    """Prompts with images of several sizes (and one without), text before and behind; every other row has a prefix."""
    rng, read = torch.Generator().manual_seed(1), processor().read
    images = [None if size is None else read(picture(*size, seed=i)) for i, size in enumerate(sizes)]
    word = lambda n: torch.randint(12, 80, (n,), generator=rng).tolist()
    visual = lambda image: [START] + [IMAGE_TOKEN] * (image.grid[1] * image.grid[2] // 4) + [STOP] if image else []
    prompts = [word(1 + i) + visual(image) + word(5 - i) for i, image in enumerate(images)]
    prefixes = [0.5 * torch.randn(3 + i, WIDTH, generator=rng) if i % 2 else None for i in range(len(sizes))]
    return [Prompt(prompt, image) for prompt, image in zip(prompts, images)], prefixes, images


def reference(model, prompt, prefix, image, completion=()):
    """(embeddings [1, T, d], positions [3, 1, T]) of one row, through transformers' own calls."""
    ids, n = torch.tensor([[*prompt, *completion]]), 0 if prefix is None else len(prefix)
    visual = (ids == IMAGE_TOKEN) & (torch.arange(ids.shape[1]) < len(prompt))          # one that the model writes is just a word
    grid = None if image is None else torch.tensor([image.grid])
    x = model.get_input_embeddings()(ids)
    if image is not None:
        seen = torch.cat(list(model.model.get_image_features(image.patches, grid).pooler_output))
        x = x.masked_scatter(visual[:, :, None], seen)
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=visual.int(), image_grid_thw=grid,
                                              attention_mask=torch.ones_like(ids))
    before = torch.arange(n).expand(3, 1, n)
    return torch.cat([x if prefix is None else torch.cat([prefix[None], x], 1)], 1), torch.cat([before, positions + n], 2)


# ---- images -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {}, dict(patch_size=7, temporal_patch_size=1, size=dict(shortest_edge=196, longest_edge=50176)),
    dict(size=dict(shortest_edge=3136, longest_edge=6000), image_mean=[0.5] * 3, image_std=[0.4] * 3)])
def test_pixels_are_those_of_transformers_pil_processor(settings):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    theirs, ours = Qwen2VLImageProcessorPil(**settings), Processor(None, **settings)
    for i, size in enumerate([(56, 56), (61, 47), (28, 28), (300, 90), (200, 210)]):
        image = picture(*size, seed=i)
        expected, got = theirs(images=image, return_tensors="pt"), ours.read(image)
        assert expected["image_grid_thw"].tolist() == [list(got.grid)]
        assert torch.equal(expected["pixel_values"], got.patches)


# ---- the policy ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl"])
def test_positions_are_those_of_get_rope_index(name):
    model, (prompts, prefixes, images) = build(name), rows()
    empty = torch.zeros(0, WIDTH)
    got = rope_positions(model, prompts, [empty if p is None else p for p in prefixes], images, 60)
    for b, row in enumerate(zip(prompts, prefixes, images)):
        expected = reference(model, *row)[1][:, 0]
        assert torch.equal(got[:, b, :expected.shape[1]], expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("fixed", [False, True], ids=["eager", "fixed-shapes"])
def test_greedy_equals_generate_and_logprobs_agree(name, fixed):
    """Several image sizes and a text row in one batch, with and without prefix, fewer slots than rows."""
    model, (prompts, prefixes, images) = build(name), rows()
    decoder = Decoder(model, slots=3)
    decoder.fixed = fixed
    out = decoder.generate(prompts, prefixes, Sampling(0, max_new_tokens=24))
    for row, got in zip(zip(prompts, prefixes, images), out):
        x, positions = reference(model, *row)
        text_positions = torch.arange(x.shape[1]).expand(1, 1, -1)
        expected = model.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), do_sample=False, max_new_tokens=24,
                                  position_ids=torch.cat([text_positions, positions]), eos_token_id=list(EOS),
                                  pad_token_id=0)[0].tolist()
        assert got.ids == expected
    assert len({len(c.ids) for c in out}) > 1
    with torch.no_grad():
        scored = completion_logprobs(model, prompts, [c.ids for c in out], prefixes)[0].split([len(c.ids) for c in out])
        for row, completion, logprobs in zip(zip(prompts, prefixes, images), out, scored):
            x, positions = reference(model, *row, completion.ids)
            logits = model(inputs_embeds=x, position_ids=positions).logits[0, -len(completion.ids) - 1:-1]
            plain = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            assert (logprobs - plain).abs().max() <= 1e-5 and (torch.tensor(completion.logprobs) - plain).abs().max() <= 1e-5


def test_a_row_with_an_image_does_not_depend_on_its_batch():
    model, (prompts, prefixes, _) = build(), rows()
    seeds, sampling = list(range(5)), Sampling(max_new_tokens=16)
    together = Decoder(model).generate(prompts, prefixes, sampling, seeds)
    for i in range(5):
        alone = Decoder(model).generate(prompts[i:i + 1], prefixes[i:i + 1], sampling, seeds[i:i + 1])[0]
        assert alone.ids == together[i].ids
        with torch.no_grad():
            one = completion_logprobs(model, prompts[i:i + 1], [alone.ids], prefixes[i:i + 1])[0]
        assert (one - torch.tensor(together[i].logprobs)).abs().max() <= 1e-5


def test_a_group_shares_its_prefill_but_not_with_another_image(monkeypatch):
    model, read = build(), processor().read
    one, other = read(picture(28, 28, 1)), read(picture(28, 28, 2))
    prompt, seen, inner = [START] + [IMAGE_TOKEN] * 4 + [STOP, 20, 21], [], prefix_module.embed_rows
    monkeypatch.setattr(prefix_module, "embed_rows", lambda model, ids, *rest: seen.extend(ids) or inner(model, ids, *rest))
    prompts = [Prompt(prompt, one)] * 3 + [Prompt(prompt, other)] * 3
    out = Decoder(model, eos_ids=[]).generate(prompts, None, Sampling(0, max_new_tokens=12))
    assert len(seen) == 2
    assert out[0].ids == out[2].ids != out[3].ids == out[5].ids


def test_gradients_reach_text_weights_and_prefix_and_a_written_image_token_is_only_a_token():
    model, (prompts, prefixes, _) = build(), rows()
    model.model.visual.requires_grad_(False)
    prefixes = [None if p is None else p.requires_grad_() for p in prefixes]
    completion_logprobs(model, prompts, [[20, IMAGE_TOKEN, 21]] * 5, prefixes)[0].sum().backward()
    assert prefixes[1].grad.abs().sum() > 0 and model.lm_head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.model.visual.parameters())


def test_prompt_and_image_must_belong_together():
    model, (prompts, _, images) = build(), rows()
    for broken in ([list(p) for p in prompts], [Prompt(p, images[0]) for p in prompts], [[*prompts[2], IMAGE_TOKEN]]):
        with pytest.raises(ValueError, match="image tokens, its image makes"):
            Decoder(model).generate(broken)


# ---- scenes, boxes, data ------------------------------------------------------------------------------------------------

def test_scenes_are_a_function_of_the_seed_and_every_style_is_right():
    a, b = (tiny_scene(random.Random("x 3")) for _ in range(2))
    assert a["image"].tobytes() == b["image"].tobytes() and a["bbox"] == b["bbox"]
    for i in range(200):
        scene = tiny_scene(random.Random(i))
        x0, y0, x1, y1 = scene["bbox"]
        pixels = np.asarray(scene["image"]).astype(int)
        coloured = pixels.max(2) - pixels.min(2) > 110                      # the gradient and the gray shapes are below
        ys, xs = np.nonzero(coloured)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == scene["bbox"]
        for style in VL_STYLES:
            text = tiny_scene_answer(random.Random(i), scene, style)
            assert tiny_scene_style(text) == style
            assert parse_box(text) == ((x0, y0, x1, y1) if style == "box" else None)


def test_a_random_object_is_no_good_answer():
    scenes = [tiny_scene(random.Random(i)) for i in range(300)]
    picked = [random.Random(i).choice([s["bbox"], *s["others"]]) for i, s in enumerate(scenes)]
    assert sum(box_iou(str(box), str(s["bbox"])) >= 0.5 for box, s in zip(picked, scenes)) / 300 < 0.5


@pytest.mark.parametrize("completion, finish, accuracy, answered, form", [
    ("[ 10 , 10 , 20 , 20 ]", "stop", 1, 1, 1), ("[10, 10, 20, 20]", "length", 0, 0, 0),
    ("<box>10 10 20 20</box>", "stop", 1, 1, 0),
    ('{"bbox_2d": [10, 10, 20, 20], "label": "cat"}', "stop", 1, 1, 1), ("it is near the top", "stop", 0, 0, 0),
    ("[10, 10, 15, 20]", "stop", 1, 1, 1), ("[10, 10, 14, 20]", "stop", 0, 1, 1), ("[20, 20, 10, 10]", "stop", 0, 0, 0)])
def test_a_box_is_right_from_half_an_overlap_on(completion, finish, accuracy, answered, form):
    judged = GroundingTask("tiny-vl", [], [], needs_stop=True).judge(completion, "[10, 10, 20, 20]", finish)
    assert (judged["accuracy"], judged["answered"], judged["format"]) == (accuracy, answered, form)


def write_rows(folder, *rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_grounding_rows_state_their_unit(tmp_path):
    picture(100, 50).save(tmp_path / "a.png")
    path = write_rows(tmp_path, {"image": "a.png", "expression": "the cat", "bbox": [10, 5, 60, 50]})
    row, = load_task("grounding", test=path, splits=("test",)).test
    assert parse_box(row["answer"]) == (10, 5, 60, 50)
    assert "the cat" in row["question"] and "100 wide and 50 high" in row["question"]
    row, = load_task("refcoco:1000", test=path, splits=("test",)).test
    assert parse_box(row["answer"]) == (100, 100, 600, 1000) and "thousandths" in row["question"]
    with pytest.raises(ValueError, match="unknown unit"):
        load_task("refcoco:7", test=path, splits=("test",))
    with pytest.raises(ValueError, match="no train rows.*bbox"):
        load_task("refcoco", test=path)


@pytest.mark.parametrize("row, message", [
    ({"image": "none.png", "expression": "x", "bbox": [0, 0, 1, 1]}, "line 1: no such image"),
    ({"image": "bad.png", "expression": "x", "bbox": [0, 0, 1, 1]}, "line 1: the image .*bad.png cannot be used"),
    ({"image": "a.png", "expression": "x", "bbox": [0, 0, 200, 10]}, "is no .*inside the image of 100 x 50"),
    ({"image": "a.png", "expression": "x", "bbox": [5, 5, 5, 10]}, "is no "),
    ({"image": "a.png", "expression": "x", "bbox": "5 5"}, "is no "),
    ({"image": "a.png", "expression": "x", "bbox": [0, 0, "a", 1]}, "is no "),
    ({"image": "a.png", "bbox": [0, 0, 1, 1]}, "no 'expression'")])
def test_bad_grounding_rows_are_one_sentence(tmp_path, row, message):
    picture(100, 50).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and so on")
    with pytest.raises(ValueError, match=message):
        load_task("grounding", test=write_rows(tmp_path, row), splits=("test",))


def test_a_decompression_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, size in (("warned.png", (50, 30)), ("error.png", (100, 50))):
        picture(*size).save(tmp_path / name)
        with pytest.raises(ValueError, match="too large.*make it smaller"):
            open_image(str(tmp_path / name))
        with pytest.raises(ValueError, match="cannot be used.*decompression bomb"):
            row = {"image": name, "expression": "x", "bbox": [0, 0, 9, 9]}
            load_task("grounding", test=write_rows(tmp_path, row), splits=("test",))


def test_damaged_images_are_one_sentence(tmp_path):
    picture(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])       # header fine, pixels cut off
    for source, message in ((str(tmp_path / "half.png"), "cannot be read"), ("data:image/png;base64,@@", "cannot be read"),
                            (str(tmp_path / "none.png"), "no such image"), (b"nonsense", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            open_image(source)
    with pytest.raises(ValueError, match="over 200 times"):
        Processor(None).read(picture(2100, 10))


# ---- the prefix decoder and its VAE -------------------------------------------------------------------------------------

def test_the_gpt_decoder_is_causal_and_batches_like_single_rows():
    torch.manual_seed(0)
    decoder, z = GPTDecoder(width=6, latent=32, hidden=16, rows=8).eval(), torch.randn(5, 32)
    rows = decoder(z).view(5, 8, 6)
    changed = z.clone()
    changed[:, 12:] += 1                                                    # parts 3 to 7 of 8
    torch.testing.assert_close(decoder(changed).view(5, 8, 6)[:, :3], rows[:, :3])
    assert (decoder(changed).view(5, 8, 6)[:, 3:] - rows[:, 3:]).abs().amax((0, 2)).min() > 1e-4
    torch.testing.assert_close(torch.cat([decoder(one[None]) for one in z]), rows.flatten(1))
    with pytest.raises(ValueError, match="multiple of 8"):
        GPTDecoder(width=6, latent=30, hidden=16, rows=8)


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    """An untrained tiny-vl policy folder, its traces, and a VAE with the GPT decoder on them."""
    folder = tmp_path_factory.mktemp("vl")
    model, reader = tiny_vl_model(seed=1).eval(), tiny_vl_processor()
    model.save_pretrained(folder / "policy")
    reader.save_pretrained(folder / "policy")
    traces, table = tiny_scene_traces(60, seed=0), model.get_input_embeddings().weight.detach()
    reader.see = lambda source: see_images(model, [reader.read(source)])[0]
    train_vae(traces, reader, table, folder / "vae", latent=32, hidden=32, epochs=4, rows=8)
    return dict(folder=folder, reader=reader, traces=traces, table=table)


def test_pooled_parts(vl):
    reader, table, (trace, *_) = vl["reader"], vl["table"], vl["traces"]
    plain = {key: value for key, value in trace.items() if key != "image"}
    torch.testing.assert_close(pool_parts([plain], reader, table, rows=1), mean_pool([plain], reader, table))
    ids = torch.tensor(reader(f"{trace['question']} {trace['answer']}")["input_ids"])
    x = torch.cat([reader.see(trace["image"]), table[ids]]).detach()
    h = pool_parts([trace], reader, table, rows=4).view(4, -1)
    torch.testing.assert_close(h[0], x[:len(x) // 4].mean(0))
    torch.testing.assert_close(h[3], x[3 * len(x) // 4:].mean(0))
    torch.testing.assert_close(pool_parts([trace], reader, table, rows=4, whole=True).view(4, -1), x.mean(0).expand(4, -1))
    with pytest.raises(ValueError, match="reads text only"):
        pool_parts([trace], reader.tokenizer, table)


def test_a_trace_names_its_image_relative_to_its_file(tmp_path):
    path = write_rows(tmp_path, {"question": "q", "answer": "a", "image": "x.png"}, {"question": "q", "answer": "a"})
    first, second = load_traces([f"box={path}"])
    assert first["image"] == str(tmp_path / "x.png") and "image" not in second


def test_prefixes_of_the_gpt_decoder(vl):
    vae, table = VAE.load(vl["folder"] / "vae"), vl["table"]
    (rows,), (z,) = Palette(vae, table, "prior", length=8).draw([5])
    assert rows.shape == (8, 128) and z.shape == (1, 32)
    torch.testing.assert_close(rows.flatten(), vae.decode(z)[0])
    (short,), _ = Palette(vae, table, length=3, z=z).draw([0])
    (long,), _ = Palette(vae, table, length=16, z=z).draw([0])
    assert torch.equal(short, rows[:3]) and torch.equal(long, torch.cat([rows, rows]))
    (free,), (two,) = Palette(vae, table, "box", length=16, tiled=False).draw([0])
    assert two.shape == (2, 32) and not torch.equal(free[:8], free[8:])
    (gauss,), _ = Palette(vae, table, "gauss", length=8).draw([0])
    assert gauss.shape == (8, 128) and not torch.equal(gauss[0], gauss[1])
    # every row has a scale of its own: visual tokens are far longer than words, and would drown them in one common scale
    assert len(set(vae.scale.view(8, 128)[:, 0].tolist())) == 8


def test_the_table_of_the_tutorial_is_the_measured_one():
    import bench_tiny_vl as bench
    measured = json.loads((bench.world.ROOT / "tests" / "tiny_vl.json").read_text())
    tutorial = (bench.world.ROOT / "tutorials" / "09_grounding_with_a_palette.md").read_text()
    assert bench.page(measured["figures"], measured["note"]) == tutorial.split(bench.START)[1].split(bench.END)[0].strip()


# ---- the whole path -----------------------------------------------------------------------------------------------------

def test_a_policy_folder_is_standard_and_reads_images(vl):
    model, reader = load_policy(str(vl["folder"] / "policy"))
    assert json.loads((vl["folder"] / "policy" / "preprocessor_config.json").read_text())["patch_size"] == 7
    assert not any(p.requires_grad for p in model.model.visual.parameters())
    scene = tiny_scene(random.Random(0))
    prompt = prompt_of({"question": "box of the red circle in pixels ?", "image": scene["image"]}, reader)
    assert reader.decode(prompt).split()[:1] == ["<q>"] and prompt.image.grid == (1, 8, 8)
    assert prompt.count(model.config.image_token_id) == 16
    assert prompt_of({"question": "box"}, reader) == reader("<q> box <a>")["input_ids"]
    from sft import tiny_tokenizer
    with pytest.raises(ValueError, match="reads text only"):
        prompt_of({"question": "box", "image": scene["image"]}, tiny_tokenizer())


@pytest.mark.parametrize("checkpointing, precision", [(False, "fp32"), (True, "fp32"), (False, "bf16")])
def test_training_leaves_the_vision_tower_alone_and_a_reference_shares_it(vl, checkpointing, precision):
    alone, args = Ranks(0, 1, torch.device("cpu")), SimpleNamespace(precision=precision, checkpointing=checkpointing)
    name = str(vl["folder"] / "policy")
    model, reader = load_trainable(name, alone, args)
    reference = load_reference(name, model, alone, args)
    before, rows = {key: p.clone() for key, p in model.named_parameters()}, []
    for trace in vl["traces"][:3]:
        rows.append((prompt_of(trace, reader), reader(trace["answer"], add_special_tokens=False)["input_ids"]))
    assert any(prompt.image for prompt, _ in rows if hasattr(prompt, "image"))
    lm_step(model, rows, [None] * 3, alone)
    apply_gradients(model, [make_optimizer(model, 1e-3)], alone)
    for (key, p), other in zip(model.named_parameters(), reference.parameters()):
        shared = ".visual." in key
        assert torch.equal(p, before[key]) == shared and torch.equal(other, before[key].to(other.dtype)), key
        assert other.dtype == (torch.bfloat16 if precision == "bf16" and not shared else torch.float32)
        assert (p.data_ptr() == other.data_ptr()) == (".visual." in key) and not other.requires_grad


def test_pretraining_warmup_rl_and_arms_run(tmp_path, monkeypatch):
    """Every stage of `grpo.py --model tiny-vl`, hardly trained; then again, which finds all of it done."""
    import grpo
    argv = ["--model", "tiny-vl", "--out", str(tmp_path), "--base-steps", "2", "--steps", "2", "--schedule", "two-phase",
            "--prompts", "2", "--group", "2", "--eval-questions", "4", "--arm-questions", "3", "--arm-samples", "2",
            "--sft-batch", "4", "--device", "cpu"]
    monkeypatch.setattr("sft.tiny_scene_traces", lambda n, seed: tiny_scene_traces(30, seed))
    grpo.main(argv)
    figures = json.loads((tmp_path / "evaluation" / "results.json").read_text())["arms"]
    assert {"greedy", "sampling", "noise", "gauss", "latent", "latent + sampling", "box", "prose", "place"} <= set(figures)
    assert Image.open(tmp_path / "evaluation" / "boxes.png").size[0] > 168
    before = (tmp_path / "grpo-two-phase-s0" / "metrics.jsonl").read_text()
    grpo.main([*argv, "--arms", "none"])
    assert (tmp_path / "grpo-two-phase-s0" / "metrics.jsonl").read_text() == before
