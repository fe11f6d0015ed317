"""tutorials/drawn_scenes.py: scenes, answers in styles, the task, documents with pictures."""

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import drawn_scenes
import tiny_world
from drawn_scenes import IMAGE, IMAGE_TOKENS, SIDE, STYLES, VOCABULARY
from prefix import load_policy
from rewards import box_iou, load_task, parse_box, world_of
from vae import open_image


def scenes(n):
    return [drawn_scenes.make_scene(random.Random(i)) for i in range(n)]


# ---- scenes and answers -------------------------------------------------------------------------


def test_a_scene_and_its_picture_are_functions_of_the_seed():
    first = drawn_scenes.make_scene(random.Random("x 3"))
    second = drawn_scenes.make_scene(random.Random("x 3"))
    other = drawn_scenes.make_scene(random.Random("x 4"))
    assert first == second != other
    picture = drawn_scenes.paint(first)
    assert picture.size == (SIDE, SIDE)
    assert picture.tobytes() == drawn_scenes.paint(second).tobytes()


def test_the_first_box_is_that_of_the_only_coloured_shape():
    for scene in scenes(200):
        pixels = np.asarray(drawn_scenes.paint(scene)).astype(int)  # [SIDE, SIDE, 3]
        contrast = pixels.max(2) - pixels.min(2)
        ys, xs = np.nonzero(contrast > 110)  # the gradient and the grey shapes are below
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == scene.boxes[0]


def test_shapes_do_not_overlap():
    counts = {2: 0, 3: 0}
    for scene in scenes(200):
        covered = np.zeros((SIDE, SIDE), dtype=int)
        for x0, y0, x1, y1 in scene.boxes:
            covered[y0:y1, x0:x1] += 1
        assert covered.max() == 1
        counts[len(scene.boxes)] += 1
    assert counts[2] > 100
    assert counts[3] > 20


def test_every_style_is_recognised_and_only_a_box_is_one():
    for i, scene in enumerate(scenes(200)):
        for style in STYLES:
            text = drawn_scenes.write_answer(random.Random(i), scene, style)
            assert drawn_scenes.style(text) == style
            assert text.split()[0] in drawn_scenes.OPENINGS[style]
            assert set(text.split()) <= set(VOCABULARY)
            box = None
            if style == "box":
                box = tuple(scene.boxes[0])
            assert parse_box(text) == box
    assert drawn_scenes.style("red circle") == "none"


@pytest.mark.parametrize(
    "box, style, words",
    [
        ([0, 0, 12, 12], "prose", "small red"),
        ([0, 0, 20, 18], "prose", "large red"),
        ([0, 0, 12, 12], "place", "top left"),
        ([20, 22, 34, 34], "place", "middle middle"),
        ([30, 44, 56, 56], "place", "bottom right"),
        ([40, 0, 56, 12], "place", "top right"),
    ],
)
def test_prose_and_place_say_what_is_there(box, style, words):
    scene = drawn_scenes.Scene([box], ["circle"], "red")
    assert words in drawn_scenes.write_answer(random.Random(0), scene, style)


def test_a_random_object_is_no_good_answer():
    right = 0
    for i, scene in enumerate(scenes(300)):
        box = random.Random(i).choice(scene.boxes)
        right += box_iou(str(box), str(scene.boxes[0])) >= 0.5
    assert right / 300 < 0.5


def test_traces_take_the_styles_in_turn_and_carry_their_picture():
    traces = drawn_scenes.make_traces(6, seed=0)
    assert [trace["domain"] for trace in traces] == [*STYLES, *STYLES]
    rng = random.Random("tiny scene traces 0")
    for trace in traces:
        assert drawn_scenes.style(trace["answer"]) == trace["domain"]
        scene = drawn_scenes.make_scene(rng)
        assert trace["question"] == scene.question
        assert trace["answer"] == drawn_scenes.write_answer(rng, scene, trace["domain"])
        picture = open_image(trace["image"])
        assert picture.tobytes() == drawn_scenes.paint(scene).tobytes()


# ---- the task -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, finish, accuracy, answered, form",
    [
        ("[ 10 , 10 , 20 , 20 ]", "stop", 1, 1, 1),
        ("[10, 10, 20, 20]", "length", 0, 0, 0),
        ("<box>10 10 20 20</box>", "stop", 1, 1, 0),
        ('{"bbox_2d": [10, 10, 20, 20], "label": "cat"}', "stop", 1, 1, 1),
        ("it is near the top", "stop", 0, 0, 0),
        ("[10, 10, 15, 20]", "stop", 1, 1, 1),
        ("[10, 10, 14, 20]", "stop", 0, 1, 1),
        ("[20, 20, 10, 10]", "stop", 0, 0, 0),
    ],
)
def test_a_box_is_right_from_half_an_overlap_on(completion, finish, accuracy, answered, form):
    row = {"answer": "[10, 10, 20, 20]", "finish": finish}
    judged = drawn_scenes.judge(completion, row)
    assert judged["accuracy"] == accuracy
    assert judged["answered"] == answered
    assert judged["format"] == form
    assert judged["undecided"] == 0.0
    assert (judged["iou"] >= 0.5) == (accuracy == 1)


def test_the_overlap_is_reported_as_such():
    row = {"answer": "[10, 10, 20, 20]", "finish": "stop"}
    judged = drawn_scenes.judge("[10, 10, 14, 20]", row)
    assert judged["iou"] == pytest.approx(0.4)
    assert drawn_scenes.answer("[10, 10, 14, 20]", row) == "(10.0, 10.0, 14.0, 20.0)"
    assert drawn_scenes.answer("near the top", row) is None


def test_train_and_test_scenes_are_others_and_fixed_by_the_seed(monkeypatch):
    assert (drawn_scenes.TRAIN_QUESTIONS, drawn_scenes.TEST_QUESTIONS) == (2048, 512)
    monkeypatch.setattr(drawn_scenes, "TRAIN_QUESTIONS", 100)
    monkeypatch.setattr(drawn_scenes, "TEST_QUESTIONS", 50)
    train = drawn_scenes.load("train", seed=3)
    test = drawn_scenes.load("test", seed=3)
    assert (len(train), len(test)) == (100, 50)
    assert len({row["id"] for row in train + test}) == 150
    again = drawn_scenes.load("test", seed=3)
    for row, other in zip(test, again):
        assert row["image"].tobytes() == other["image"].tobytes()
        assert row["answer"] == other["answer"]
    assert test[0]["answer"] != drawn_scenes.load("test", seed=4)[0]["answer"]
    assert not {row["image"].tobytes() for row in train} & {row["image"].tobytes() for row in test}


def test_the_scripts_reach_this_world_by_its_short_name():
    assert world_of("tiny-vl").make_policy is drawn_scenes.make_policy
    task = load_task("tiny-vl", splits=("test",))
    row = task.test[0]
    assert row["id"] == drawn_scenes.load("test")[0]["id"]
    assert task.is_grounding
    assert not task.thousandths
    assert tuple(task.styles) == STYLES
    assert "iou" in task.reward_names
    assert task.judge(row["answer"], row)["iou"] == 1.0
    assert task.judge(row["answer"], row, finish="length")["answered"] == 0.0
    assert task.style("i see a large red circle") == "prose"


# ---- documents, and what the model reads --------------------------------------------------------


def test_a_document_has_one_picture_one_question_and_an_answer_in_its_style():
    rng = random.Random(1)
    for _ in range(100):
        document = drawn_scenes.make_document(rng)
        assert set(document.words) <= set(VOCABULARY)
        assert document.words.count(IMAGE) == IMAGE_TOKENS == 16
        assert document.image.size == (SIDE, SIDE)
        question = " ".join(document.words).rpartition(tiny_world.QUESTION)[2]
        answer = question.partition(tiny_world.ANSWER)[2]
        assert drawn_scenes.style(answer) == document.style
        assert answer.endswith(tiny_world.END)


def test_without_context_a_picture_is_described_in_prose():
    rng = random.Random(3)
    styles = []
    for _ in range(2000):
        document = drawn_scenes.make_document(rng)
        if document.words[0] == tiny_world.QUESTION:
            styles.append(document.style)
    assert len(styles) > 200
    assert 0.94 < styles.count("prose") / len(styles) < 1.0


@pytest.fixture(scope="module")
def model():
    return drawn_scenes.make_model(seed=1).eval()


@pytest.fixture(scope="module")
def reader():
    return drawn_scenes.make_reader()


def batch_of_step(model, reader, step):
    config = drawn_scenes.DrawnScenesConfig(batch=12)
    return drawn_scenes.make_batch(config, step, model, reader)


def test_a_batch_is_a_function_of_its_step(model, reader):
    batch = batch_of_step(model, reader, 0)
    again = batch_of_step(model, reader, 0)
    assert torch.equal(batch.ids, again.ids)
    assert torch.equal(batch.embeddings, again.embeddings)
    assert not torch.equal(batch.ids[:, :30], batch_of_step(model, reader, 1).ids[:, :30])
    assert batch.positions.shape == (3, *batch.ids.shape)


def test_what_the_model_reads_is_what_transformers_makes_of_words_and_pictures(model, reader):
    """Pixels, visual tokens and rotary positions against the module's own forward pass."""
    batch = batch_of_step(model, reader, 0)
    rng = random.Random(drawn_scenes.seed_of(0, "scene document", 0))
    pictures = [drawn_scenes.make_document(rng).image for _ in range(12)]
    pixels = reader.image_processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        expected = model(
            input_ids=batch.ids,
            mm_token_type_ids=(batch.ids == VOCABULARY.index(IMAGE)).int(),
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"],
        ).logits
        output = model.model.language_model(
            inputs_embeds=batch.embeddings, position_ids=batch.positions
        )
        logits = model.get_output_embeddings()(output.last_hidden_state)
    torch.testing.assert_close(logits, expected)


def test_pictures_and_questions_are_not_to_be_learnt(model, reader):
    batch = batch_of_step(model, reader, 0)
    is_image = batch.ids == VOCABULARY.index(IMAGE)
    assert is_image.sum() == 12 * IMAGE_TOKENS
    assert batch.weights[is_image].sum() == 0
    for ids, weights in zip(batch.ids.tolist(), batch.weights.tolist()):
        words = [VOCABULARY[i] for i in ids]
        start = len(words) - words[::-1].index(tiny_world.ANSWER)
        end = words.index(tiny_world.END, start) + 1
        assert weights[start:end] == [1.0] * (end - start)
        assert sum(weights[end:]) == 0  # pads


def test_the_vision_tower_is_trained_with_the_rest(reader):
    trained = drawn_scenes.make_model(seed=1)
    batch = batch_of_step(trained, reader, 0)
    tiny_world.next_word_loss(trained, batch).backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad.abs().sum() > 0, name

    muon, _ = tiny_world.make_optimizers(trained)
    matrices = {id(parameter) for parameter in muon.param_groups[0]["params"]}
    visual = trained.model.visual.blocks[0].attn.proj.weight
    assert id(visual) in matrices


# ---- the base model -----------------------------------------------------------------------------


def test_the_base_is_an_ordinary_folder_with_traces(tmp_path, monkeypatch, capsys):
    traces = drawn_scenes.make_traces(15, seed=0)
    monkeypatch.setattr(drawn_scenes, "make_traces", lambda n, seed: traces)
    monkeypatch.setattr(drawn_scenes, "TEST_QUESTIONS", 40)
    config = drawn_scenes.DrawnScenesConfig(out=str(tmp_path), steps=2, batch=4)
    run = drawn_scenes.make_base(config)
    assert "opens in style box" in capsys.readouterr().out

    model, reader = load_policy(str(run.folder / "policy"))
    assert model.config.image_token_id == VOCABULARY.index(IMAGE)
    assert reader.tokenizer.get_vocab() == {word: i for i, word in enumerate(VOCABULARY)}
    settings = json.loads((run.folder / "policy" / "preprocessor_config.json").read_text())
    assert settings["patch_size"] == 7
    lines = (run.folder / "traces.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == traces
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    for style in STYLES:
        assert 0 < last[f"leak_{style}"] < 1

    again = drawn_scenes.make_base(config)
    assert again.finished
    with pytest.raises(ValueError, match="with another seed"):
        drawn_scenes.make_policy(tmp_path, seed=1, steps=2)


def test_make_policy_takes_its_steps_from_the_defaults(tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(drawn_scenes, "make_base", configs.append)
    drawn_scenes.make_policy(tmp_path, seed=2)
    drawn_scenes.make_policy(tmp_path, steps=7)
    assert [(config.seed, config.steps) for config in configs] == [(2, 400), (0, 7)]


def test_a_picture_survives_its_data_uri():
    picture = drawn_scenes.paint(scenes(1)[0])
    png = io.BytesIO()
    picture.save(png, "PNG")
    assert Image.open(png).tobytes() == picture.tobytes()
    assert open_image(drawn_scenes.data_uri(picture)).tobytes() == picture.tobytes()
