"""Drawn scenes: pictures of coloured shapes, a small Qwen2.5-VL pretrained on them, and its task.

This is `--model tiny-vl` and `--task tiny-vl`: the tiny world for vision-language models. A picture
of 56 x 56 pixels shows one coloured shape (the target) and one or two grey ones, on a gradient.
"box of the red circle in pixels ?" asks for a box. A right answer may come in three styles, of
which only the first is what was asked for:
    box    [ 12 , 20 , 30 , 40 ]
    prose  i see a large red circle
    place  it is near the top left side
As in the paper's diagnosis (Sec. 4.1) the format decides the score: without context a picture is
described in prose.

Departs from the paper, which trains on RefCOCO (here: `--task refcoco`). What this world does not
test: a tiny model learns to find a coloured thing among grey ones, and formats, within minutes, but
not to bind a colour to a shape among several coloured things. So the expression always names the
only coloured shape, and the picture alone would do: this is localisation, not the understanding of
expressions. The box of a random object is right in at most every second scene (one of two or three
objects), and needs an object's exact place as well.

Run it:
    python tutorials/drawn_scenes.py               # pretrain the base into runs/tiny-vl/base
"""

import base64
import io
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers.hf_argparser import HfArg

import tiny_world

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prefix import IMAGE, VISION_END, VISION_START, completion_logprobs, prompt_of
from rewards import LISTED_BOX, box_iou, parse_box
from sft import Ranks, Run, seed_of
from vae import (
    Reader,
    parse_settings,
    require_at_least,
    result_settings,
    run_main,
    see_images,
)

# ------------------------------------------------------------------------------------------------
# 1. Scenes, and answers in three styles

SIDE = 56  # pixels
GRAY = (120, 120, 120)
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle")
LARGE = 360  # pixels of area from which on a shape is called large

STYLES = ("box", "prose", "place")
STYLE_WORDS = {
    "box": ["[", "]", ","],
    "prose": ["i", "see", "picture", "shows"],
    "place": ["it", "is", "near", "side"],
}
OPENINGS = {"box": ["["], "prose": ["i", "picture"], "place": ["it"]}  # an answer's first word


@dataclass(frozen=True)
class Scene:
    """boxes: [x0, y0, x1, y1] in pixels, x1 and y1 exclusive, the target's first; shapes: their
    names, in the same order; colour: the target's, all others are grey."""

    boxes: list
    shapes: list
    colour: str

    @property
    def question(self):
        return f"box of the {self.colour} {self.shapes[0]} in pixels ?"


def make_scene(rng):
    """Draw a Scene. rng: random.Random."""
    boxes = []
    while len(boxes) < 2 or (len(boxes) < 3 and rng.random() < 0.5):
        width = rng.randrange(12, 27, 2)
        height = rng.randrange(12, 27, 2)
        x = rng.randrange(0, SIDE - width + 1, 2)
        y = rng.randrange(0, SIDE - height + 1, 2)
        box = [x, y, x + width, y + height]
        if not any(overlap(box, other) for other in boxes):
            boxes.append(box)
    colour = rng.choice(list(COLOURS))
    shapes = [rng.choice(SHAPES) for _ in boxes]
    return Scene(boxes, shapes, colour)


def overlap(box, other):
    """Whether two boxes have a pixel in common."""
    beside = box[2] <= other[0] or other[2] <= box[0]
    above = box[3] <= other[1] or other[3] <= box[1]
    return not beside and not above


def paint(scene):
    """The Pillow image of a Scene. The gradient behind it tells a model where a pixel is."""
    gradient = Image.linear_gradient("L").resize((SIDE, SIDE))
    ramp = gradient.point([value * 2 // 5 for value in range(256)])  # dark above, lighter below
    blue = Image.new("L", (SIDE, SIDE), 20)
    image = Image.merge("RGB", (ramp.rotate(90), ramp, blue))
    for box, shape in zip(scene.boxes[1:], scene.shapes[1:]):
        paint_shape(image, box, shape, GRAY)
    paint_shape(image, scene.boxes[0], scene.shapes[0], COLOURS[scene.colour])
    return image


def paint_shape(image, box, shape, fill):
    """Fill a shape that touches all four sides of its box."""
    x0, y0, x1, y1 = box
    right, bottom = x1 - 1, y1 - 1  # the last pixels inside
    draw = ImageDraw.Draw(image)
    if shape == "triangle":
        draw.polygon([(x0, bottom), (right, bottom), ((x0 + right) / 2, y0)], fill=fill)
    elif shape == "circle":
        draw.ellipse((x0, y0, right, bottom), fill=fill)
    else:
        draw.rectangle((x0, y0, right, bottom), fill=fill)


def write_answer(rng, scene, style):
    """A right answer in one style, as text without the end token."""
    x0, y0, x1, y1 = scene.boxes[0]
    if style == "box":
        return f"[ {x0} , {y0} , {x1} , {y1} ]"
    if style == "prose":
        opening = rng.choice(("i see", "picture shows"))
        size = "small"
        if (x1 - x0) * (y1 - y0) >= LARGE:
            size = "large"
        return f"{opening} a {size} {scene.colour} {scene.shapes[0]}"
    row = ("top", "middle", "bottom")[third_of(y0, y1)]
    column = ("left", "middle", "right")[third_of(x0, x1)]
    return f"it is near the {row} {column} side"


def third_of(low, high):
    """In which third of the picture, 0 to 2, the middle of a side lies."""
    return min(2, (low + high) * 3 // (2 * SIDE))


def style(completion):
    """The style that a completion is written in: the first that has a style word in it; "none"
    without any."""
    words = set(completion.split())
    for name in STYLES:
        if words & set(STYLE_WORDS[name]):
            return name
    return "none"


def make_trace(rng, scene, style):
    """One trace {question, answer, domain} of a Scene, its domain the style; without image."""
    answer = write_answer(rng, scene, style)
    return {"question": scene.question, "answer": answer, "domain": style}


def make_traces(n, seed):
    """n traces {question, answer, domain, image}, styles in turn; the image is a PNG as a data
    URI, so that a JSONL holds it all."""
    rng = random.Random(f"tiny scene traces {seed}")
    traces = []
    for i in range(n):
        scene = make_scene(rng)
        trace = make_trace(rng, scene, STYLES[i % len(STYLES)])
        trace["image"] = data_uri(paint(scene))
        traces.append(trace)
    return traces


def data_uri(image):
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


# ------------------------------------------------------------------------------------------------
# 2. The task: what every script asks of a task file (see rewards.py)

DOMAINS = STYLES
TEST_QUESTIONS, TRAIN_QUESTIONS = 512, 2048
DEFAULTS = {**tiny_world.DEFAULTS, "max_new_tokens": 14, "base_steps": 400}
DEFAULTS["sft"] = {
    "prior": {"lr": 3e-6, "tokens_per_batch": 1024},
    "posterior": {"steps": 30, "lr": 1e-4, "lengths": [8], "tokens_per_batch": 1024},
}


def load(split, seed=0):
    """Rows {question, answer, image, id} of "train" (2,048) or "test" (512). answer: the box as
    text; image: a Pillow image, 9 KB each in memory."""
    numbers = range(TEST_QUESTIONS)
    if split == "train":
        numbers = range(TEST_QUESTIONS, TEST_QUESTIONS + TRAIN_QUESTIONS)
    rows = []
    for i in numbers:
        scene = make_scene(random.Random(f"tiny scene task {seed} {i}"))
        row = {"question": scene.question, "answer": str(scene.boxes[0])}
        row["image"] = paint(scene)
        row["id"] = f"scene {seed} {i}"
        rows.append(row)
    return rows


def answer(completion, row):
    """The last box in a completion as text, "(x0, y0, x1, y1)", or None. A completion that was cut
    off by the length limit has none."""
    if row["finish"] == "length":
        return None
    box = parse_box(completion)
    if box is None:
        return None
    return str(box)


def judge(completion, row):
    """accuracy: the box overlaps the gold one by half, IoU >= 0.5 (Sec. 4.1). iou: as such, in
    [0, 1]. format: the completion holds a list of four numbers in square brackets."""
    box = answer(completion, row)
    if box is None:
        return {"accuracy": 0.0, "answered": 0.0, "format": 0.0, "undecided": 0.0, "iou": 0.0}
    iou = box_iou(box, row["answer"])
    is_listed = LISTED_BOX.search(completion) is not None
    return {
        "accuracy": float(iou >= 0.5),
        "answered": 1.0,
        "format": float(is_listed),
        "undecided": 0.0,
        "iou": iou,
    }


# ------------------------------------------------------------------------------------------------
# 3. The pretraining text: tiny_world's openings, then one picture with a question and an answer

PATCH, MERGE = 7, 2  # pixels of a patch's side; patches of a visual token's side
IMAGE_TOKENS = (SIDE // (PATCH * MERGE)) ** 2
QUESTION_WORDS = ["?", "box", "pixels"]
ANSWER_WORDS = ["small", "large", "top", "middle", "bottom", "left", "right"]
WORDS = tiny_world.list_words(
    QUESTION_WORDS,
    ANSWER_WORDS,
    COLOURS,
    SHAPES,
    *STYLE_WORDS.values(),
    tiny_world.NEUTRAL_WORDS,
)
NUMBERS = [str(number) for number in range(SIDE + 1)]
MARKS = [tiny_world.PAD, tiny_world.END, tiny_world.QUESTION, tiny_world.ANSWER]
VOCABULARY = [*MARKS, VISION_START, VISION_END, IMAGE, *WORDS, *NUMBERS]
LEAK = 1e-2  # share of documents without context in each of the styles box and place


def _new_trace(rng, style):
    return make_trace(rng, make_scene(rng), style)


WORLD = tiny_world.World(
    styles=STYLES,
    topic_shares=(0.7, 0.15, 0.15),
    chat_shares=(LEAK, 1 - 2 * LEAK, LEAK),
    style_words=STYLE_WORDS,
    content_words=[*WORDS, *NUMBERS],
    make_trace=_new_trace,
)


def make_document(rng):
    """A tiny_world.Document: an opening, a picture, a question, an answer."""
    document = tiny_world.document_opening(rng, WORLD)
    scene = make_scene(rng)
    trace = make_trace(rng, scene, document.style)
    document.words += [tiny_world.QUESTION, VISION_START, *[IMAGE] * IMAGE_TOKENS, VISION_END]
    document.words += [*trace["question"].split(), tiny_world.ANSWER]
    document.words += [*trace["answer"].split(), tiny_world.END]
    document.image = paint(scene)
    return document


# ------------------------------------------------------------------------------------------------
# 4. The model and its pretraining


def make_reader():
    """The tokenizer, and transformers' image processor with this world's settings: 8 x 8 patches
    of 7 pixels, 4 x 4 visual tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    bounds = {"shortest_edge": 14 * 14, "longest_edge": 224 * 224}  # pixels of area
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1, size=bounds
    )
    return Reader(tiny_world.make_tokenizer(VOCABULARY), processor)


def make_model(seed=0):
    """A Qwen2.5-VL of 2 layers and width 128, with a vision tower of 1 layer and width 64,
    untrained."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": VOCABULARY.index(tiny_world.END),
        "pad_token_id": VOCABULARY.index(tiny_world.PAD),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [4, 6, 6],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 1,
        "window_size": SIDE,
        "fullatt_block_indexes": [0],
        "out_hidden_size": 128,
        "initializer_range": 0.08,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=VOCABULARY.index(IMAGE),
        vision_start_token_id=VOCABULARY.index(VISION_START),
        vision_end_token_id=VOCABULARY.index(VISION_END),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_batch(config, step, model, reader):
    """The documents of one step as a tiny_world.Batch, a pure function of the seed and the step:
    with what the vision tower sees in the pictures, and with rotary positions."""
    rng = random.Random(seed_of(config.seed, "scene document", step))
    documents = [make_document(rng) for _ in range(config.batch)]
    batch = tiny_world.embed_documents(documents, model, reader.tokenizer)

    pictures = [reader.read_image(document.image) for document in documents]
    is_image = batch.ids == model.config.image_token_id  # [B, T]
    visual = torch.cat(see_images(model, pictures))  # [B * IMAGE_TOKENS, d]
    batch.embeddings = batch.embeddings.masked_scatter(is_image[:, :, None], visual)
    batch.positions, _ = model.model.get_rope_index(
        batch.ids,
        mm_token_type_ids=is_image.int(),
        image_grid_thw=torch.tensor([picture.grid for picture in pictures]),
    )  # [3, B, T]
    return batch


@torch.no_grad()
def style_leak(model, reader, questions=256):
    """{style: mean probability of its opening words} where an answer begins, without context."""
    prompts = [prompt_of(row, reader) for row in load("test")[:questions]]
    leak = {}
    for name in STYLES:
        leak[name] = 0.0
        for token in reader.tokenizer.convert_tokens_to_ids(OPENINGS[name]):
            completions = [[token]] * len(prompts)
            logprobs, _ = completion_logprobs(
                model, prompts, completions, [None] * len(prompts), with_entropy=False
            )
            leak[name] += logprobs.exp().mean().item()
    return leak


def make_base(config):
    """Make the base model in config.out: policy/ (a Hugging Face folder) and traces.jsonl. A
    finished one of the same settings is left alone, others are refused (ValueError)."""
    settings = {"world": "tiny-vl", **result_settings(config)}
    run = Run(config.out, settings, Ranks.alone(), config.resume, config.overwrite)
    if run.finished:
        return run
    model = make_model(config.seed)
    reader = make_reader()

    def batch_of_step(step):
        return make_batch(config, step, model, reader)

    tiny_world.pretrain(run, model, batch_of_step, config.steps, config.save_every)
    leak = style_leak(model, reader)
    traces = make_traces(1500, config.seed)
    target = f"{LEAK:.2%} for box and place"
    tiny_world.finish_base(run, model, reader, traces, leak, config.steps, target)
    return run


def make_policy(folder, seed=0, steps=None):
    """What grpo.py and the others call where the base is missing; resumes an unfinished one."""
    if steps is None:
        steps = DEFAULTS["base_steps"]
    make_base(DrawnScenesConfig(out=str(folder), seed=seed, steps=steps, resume=True))


# ------------------------------------------------------------------------------------------------
# 5. Command line


@dataclass
class DrawnScenesConfig:
    """Settings of the base; its run is a pure function of those with compare=True."""

    out: str = HfArg(default="runs/tiny-vl/base", help="run folder", compare=False)
    seed: int = HfArg(default=0, help="seed of everything random")
    steps: int = HfArg(default=400, help="updates")
    batch: int = HfArg(default=48, help="documents per update")
    save_every: int = HfArg(default=100, help="steps between checkpoints", compare=False)
    resume: bool = HfArg(default=False, help="go on with an unfinished run", compare=False)
    overwrite: bool = HfArg(default=False, help="replace a run of other settings", compare=False)

    def __post_init__(self):
        require_at_least(self, steps=1, batch=1, save_every=1)


def main(argv=None):
    """Make the base."""
    run = make_base(parse_settings(DrawnScenesConfig, __doc__, argv))
    print(f"the tiny base is in {run.folder}/policy")


if __name__ == "__main__":
    run_main(main, "drawn_scenes.py")
