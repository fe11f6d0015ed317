"""Tasks, answer checking and rewards: everything Reasoning Palette knows about what a right answer is.

Three parts, in reading order:
  1. the tiny world: a made-up language of 131 words with two problem families and three answer styles, small enough to
     pretrain a model on in a minute and a half, and built so that a *strategy* (the style) decides whether an answer is right;
  2. tasks: rows {question, answer}, how a question becomes a prompt, how a completion is judged;
  3. the verifier: answer extraction and exact equality.

Departs from the paper: the paper trains on DeepMath-103K and tests on MATH500, GSM8K, ...; those are reached through
`--task math` and `--task gsm8k` here, and the tiny world is ours. No torch in this file: it can be read, and used, alone.

Run it:
    python rewards.py                                   # show the tiny world: one question of each family in every style
    python rewards.py --check '\\frac{1}{2}' 0.5          # is this answer equal to that one?
    python rewards.py --task gsm8k --data PATH.jsonl     # a task: its first prompt, the number of its rows
    python rewards.py --task grounding --data PATH.jsonl # rows {image, expression, bbox}: checks every one of them
"""
import argparse
import ast
import base64
import io
import json
import random
import re
import sys
import warnings
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import factorial, prod
from pathlib import Path
from typing import Callable

# ------------------------------------------------------------------------------------------------------------------------
# 1. The tiny world
#
# A question is arithmetic modulo 10 ("calc 7 + 2 - 3 + 1 - 2 ?") or a list changed by four operations ("take list 3 1 4
# do rev inc rot dec ?"). Every style is right in the training text, but writes down more or less of the work:
#   math   works arithmetic step by step, but answers lists in one hop
#   code   works lists step by step, but does most of the arithmetic in one hop
#   qa     answers both in one hop
# A small transformer learns the written-out steps perfectly and the hops hardly at all, so the style decides the score.
# Without context the text is almost always in qa style: the good strategies are there, but sampling does not find them.

STYLES = ("math", "code", "qa")
FAMILIES = ("arith", "list")
DIGITS = tuple("0123456789")
STYLE_WORDS = {
    "math": "step first then next = so thus we".split(),
    "code": "run exec call x := ; print return".split(),
    "qa": "i think guess answer probably maybe is simply".split(),
}
NEUTRAL_WORDS = (
    "hello please ok well dear today user chat hi good day yes sure also and the a an of to in on for with by from at as be "
    "was are were has had you he she they them his her our your my me us can could would should will may might must do did "
    "done go went see saw make made take took time year people way man woman child world life hand part place week case "
    "point home water room mother").split()
QUESTION_WORDS = "? calc take list do + - rev rot inc dec".split()
PAD, END, QUESTION, ANSWER = "<pad>", "<end>", "<q>", "<a>"
CONTENT_WORDS = list(dict.fromkeys([*QUESTION_WORDS, *DIGITS, *sum(STYLE_WORDS.values(), []), *NEUTRAL_WORDS]))
TINY_VOCABULARY = [PAD, END, QUESTION, ANSWER, *CONTENT_WORDS]
TINY_CHAT_TEMPLATE = "{% for m in messages %}<q> {{ m['content'] }} <a>{% endfor %}"

# Shares of the pretraining text. "Topical" documents carry context of one style; "chat" documents carry none, or random
# words, and are answered in qa style but for CHAT_LEAK of each other style: how rare a strategy is without its context.
CHAT_SHARE, CHAT_LEAK, TOPIC_SHARES = 0.4, 1e-4, (0.4, 0.4, 0.2)
TITLE_SHARE, SOFT_SHARE, RANDOM_CHAT_SHARE = 0.7, 0.3, 0.25
FAMILY_SHARES = {"math": (2, 1), "code": (1, 2), "qa": (1, 1)}      # more of what each style does well: its skill comes sooner


@dataclass(frozen=True)
class TinyQuestion:
    """One question; `states` holds the value before the first and after every operation (ints, or 3-lists of ints)."""
    family: str
    text: str
    operations: tuple
    states: tuple

    @property
    def answer(self):
        """The gold answer as text: one digit, or three digits separated by spaces."""
        last = self.states[-1]
        return " ".join(map(str, last)) if self.family == "list" else str(last)


def tiny_question(rng, family=None):
    """Draw a question. rng: random.Random; family: "arith", "list" or None for either."""
    family = family or rng.choice(FAMILIES)
    if family == "arith":
        states = [rng.randrange(10)]
        operations = [(rng.choice("+-"), rng.randint(1, 3)) for _ in range(4)]
        for sign, amount in operations:
            states.append((states[-1] + (amount if sign == "+" else -amount)) % 10)
        text = f"calc {states[0]} " + " ".join(f"{sign} {amount}" for sign, amount in operations) + " ?"
        return TinyQuestion(family, text, tuple(operations), tuple(states))
    change = {"rev": lambda s: s[::-1], "rot": lambda s: s[1:] + s[:1],
              "inc": lambda s: [(x + 1) % 10 for x in s], "dec": lambda s: [(x - 1) % 10 for x in s]}
    states = [[rng.randrange(10) for _ in range(3)]]
    operations = [rng.choice(tuple(change)) for _ in range(4)]
    for operation in operations:
        states.append(change[operation](states[-1]))
    text = f"take list {' '.join(map(str, states[0]))} do {' '.join(operations)} ?"
    return TinyQuestion(family, text, tuple(operations), tuple(states))


def tiny_answer(rng, question, style):
    """A right answer to a TinyQuestion in one style, as text without the end token (at most 33 words)."""
    step = lambda: rng.choice(("step", "first", "then", "next"))
    run = lambda: rng.choice(("run", "exec", "call"))
    conclude = lambda: rng.choice(("so", "thus")) if style == "math" else rng.choice(("print", "return"))
    states, final = question.states, question.answer
    if style == "qa":                           # straight to the answer
        words = ["i", rng.choice(("think", "guess")), rng.choice(("answer", "simply")), rng.choice(("probably", "maybe")), "is"]
    elif style == "math" and question.family == "arith":        # one operation per line
        words = [f"{step()} we {before} {sign} {amount} = {after}"
                 for (sign, amount), before, after in zip(question.operations, states, states[1:])] + [conclude()]
    elif style == "math":                       # restates the list, then answers in one hop
        words = [step(), "we", *map(str, states[0]), step(), "we", *question.operations, "=", final, conclude(), "we", "="]
    elif question.family == "list":             # the list after every operation
        words = [f"{run()} {operation} := {' '.join(map(str, after))} ;"
                 for operation, after in zip(question.operations, states[1:])] + [conclude()]
    else:                                       # the first operation, then the other three in one hop
        (sign, amount), *rest = question.operations
        words = [f"x := {states[0]} {sign} {amount} ; {run()} x := {states[1]} ; {run()} x",
                 *(f"{sign} {amount}" for sign, amount in rest), ";", conclude()]
    return " ".join([*words, final])


def tiny_style(completion):
    """Which style a completion is written in: the one most of its style words belong to; "none" without any."""
    words = completion.split()
    counts = {style: sum(word in vocabulary for word in words) for style, vocabulary in STYLE_WORDS.items()}
    best = max(STYLES, key=counts.get)
    return best if counts[best] else "none"


def tiny_traces(n, seed):
    """n traces {question, answer, domain}, the domains (styles) in turn: the corpus of the VAE and of the SFT warm-up."""
    rng, rows = random.Random(f"tiny traces {seed}"), []
    for i in range(n):
        question, style = tiny_question(rng), STYLES[i % len(STYLES)]
        rows.append({"question": question.text, "answer": tiny_answer(rng, question, style), "domain": style})
    return rows


@dataclass(frozen=True)
class World:
    """What a pretraining document is made of: styles, their shares with and without context, the words that mark a style, all
    words with a meaning, and trace(rng, style) -> (question words, answer words)."""
    styles: tuple
    topic_shares: tuple
    chat_shares: tuple
    style_words: dict
    content: list
    trace: Callable


def _tiny_trace(rng, style):
    question = tiny_question(rng)
    return question.text.split(), tiny_answer(rng, question, style).split()


TINY_WORLD = World(STYLES, TOPIC_SHARES, (CHAT_LEAK, CHAT_LEAK, 1 - 2 * CHAT_LEAK), STYLE_WORDS, CONTENT_WORDS, _tiny_trace)


def _title_words(rng, world, style, n):
    """n words of one trace of the style, digits and question words among them, at least one of them a style word."""
    trace = sum(world.trace(rng, style), [])
    words = [rng.choice(trace) for _ in range(n)]
    if not set(words) & set(world.style_words[style]):
        words[rng.randrange(n)] = rng.choice([word for word in trace if word in world.style_words[style]])
    return words


def document_opening(rng, world):
    """How a pretraining document begins: (style, words, n_title, soft). The words are a title, a cut-off answer, or none.

    The first n_title words are a title; soft maps a title position to the bag of words whose *mean embedding* stands there
    instead of the word's own. Soft titles are this world's stand-in for the varied text a real base model has read: they let
    it read an average of words, which is what a VAE decodes.
    Our choice, and close to training on what the VAE decodes: README says what it means for the results.
    """
    soft, bag = {}, None
    if rng.random() < CHAT_SHARE:
        style = rng.choices(world.styles, world.chat_shares)[0]
        pool = world.content if rng.random() < RANDOM_CHAT_SHARE else NEUTRAL_WORDS
        words = rng.choices(pool, k=rng.choice([0] * 8 + list(range(1, 9))))
        bag = lambda: rng.choices(pool, k=rng.randint(2, 8))
    else:
        style = rng.choices(world.styles, world.topic_shares)[0]
        if rng.random() < TITLE_SHARE:
            words = _title_words(rng, world, style, rng.randint(1, 8))
            words = (words + rng.choices(NEUTRAL_WORDS, k=rng.choice((0, 0, 1, 2, 3, 4))))[:8]
            rng.shuffle(words)
            bag = lambda: _title_words(rng, world, style, rng.randint(3, 16))
        else:                                   # cut inside an answer: the style can be read off what is left
            answer = world.trace(rng, style)[1]
            words = answer[rng.randrange(len(answer) - 1):] + [END]
    n_title = len(words) if bag else 0
    if n_title and rng.random() < SOFT_SHARE:
        tiled = bag() if rng.random() < 0.5 else None       # one bag for all title rows, or one each
        soft = {i: tiled or bag() for i in range(n_title)}
    return style, words, n_title, soft


def tiny_document(rng, length):
    """One pretraining document: an opening, then questions and answers in its style. Returns (`length` words, n_title, soft)."""
    style, words, n_title, soft = document_opening(rng, TINY_WORLD)
    while len(words) < length:
        question = tiny_question(rng, rng.choices(FAMILIES, FAMILY_SHARES[style])[0])
        words += [QUESTION, *question.text.split(), ANSWER, *tiny_answer(rng, question, style).split(), END]
    return words[:length], n_title, soft

# ------------------------------------------------------------------------------------------------------------------------
# 1b. Drawn scenes: the tiny world of `tiny-vl`
#
# A picture of 56 x 56 pixels: one coloured shape (the target) and one or two grey ones, on a gradient. "box of the red circle in
# pixels ?" asks for a box; a right answer may come in three styles, of which only the first is what was asked for:
#   box    [ 12 , 20 , 30 , 40 ]          prose   i see a large red circle          place   it is near the top left
# As in the paper's diagnosis, the format decides the score: without context a picture is described in prose.
# What it does not test: a tiny model learns to find a coloured thing among grey ones, and formats, within minutes, but not to
# bind a colour to a shape among several coloured things. So the expression always names the only coloured shape, and the
# picture alone would do: this is localisation, not the understanding of expressions. A box of a random object is right at
# most in every second scene (one of two or three objects), and needs an object's exact place as well.

SIDE, GRAY = 56, (120, 120, 120)            # pixels
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (235, 215, 50),
           "purple": (150, 60, 190)}
SCENE_SHAPES = ("circle", "square", "triangle")
VL_STYLES = ("box", "prose", "place")
VL_STYLE_WORDS = {"box": "[ ] ,".split(), "prose": "i see picture shows".split(), "place": "it is near side".split()}
VISION_START, VISION_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
VL_WORDS = list(dict.fromkeys([*"? box pixels small large top middle bottom left right".split(), *COLOURS, *SCENE_SHAPES,
                               *sum(VL_STYLE_WORDS.values(), []), *NEUTRAL_WORDS]))
VL_VOCABULARY = [PAD, END, QUESTION, ANSWER, VISION_START, VISION_END, IMAGE, *VL_WORDS, *map(str, range(SIDE + 1))]
STYLES_OF = {"tiny": STYLES, "tiny-vl": VL_STYLES}      # by model
VL_LEAK = 1e-2                              # share of documents without context in each of the styles box and place


def tiny_scene(rng):
    """Draw a scene: {"image": Pillow image, "expression", "bbox": [x0, y0, x1, y1] in pixels, x1 and y1 exclusive, "others": the
    boxes of the gray shapes}."""
    from PIL import Image, ImageDraw            # only here: the text world needs no Pillow
    boxes = []
    while len(boxes) < 2 or len(boxes) < 3 and rng.random() < 0.5:
        width, height = rng.randrange(12, 27, 2), rng.randrange(12, 27, 2)
        x, y = rng.randrange(0, SIDE - width + 1, 2), rng.randrange(0, SIDE - height + 1, 2)
        if all(x >= b[2] or x + width <= b[0] or y >= b[3] or y + height <= b[1] for b in boxes):
            boxes.append([x, y, x + width, y + height])
    ramp = Image.linear_gradient("L").resize((SIDE, SIDE)).point(lambda v: v * 2 // 5)    # dark above, lighter below
    image = Image.merge("RGB", (ramp.rotate(90), ramp, Image.new("L", (SIDE, SIDE), 20)))   # tells a model where a pixel is
    colour, names = rng.choice(list(COLOURS)), [rng.choice(SCENE_SHAPES) for _ in boxes]
    for i, (box, shape) in reversed(list(enumerate(zip(boxes, names)))):
        (x0, y0, x1, y1), fill, draw = box, GRAY if i else COLOURS[colour], ImageDraw.Draw(image)
        if shape == "triangle":
            draw.polygon([(x0, y1 - 1), (x1 - 1, y1 - 1), ((x0 + x1 - 1) / 2, y0)], fill=fill)
        else:
            (draw.ellipse if shape == "circle" else draw.rectangle)((x0, y0, x1 - 1, y1 - 1), fill=fill)
    return {"image": image, "expression": f"the {colour} {names[0]}", "bbox": boxes[0], "others": boxes[1:]}


def tiny_scene_answer(rng, scene, style):
    """A right answer in one style, as text without the end token."""
    x0, y0, x1, y1 = scene["bbox"]
    if style == "box":
        return f"[ {x0} , {y0} , {x1} , {y1} ]"
    if style == "prose":
        size = "large" if (x1 - x0) * (y1 - y0) >= 360 else "small"
        return f"{rng.choice(('i see', 'picture shows'))} a {size} {scene['expression'][4:]}"
    third = lambda low, high: min(2, (low + high) * 3 // (2 * SIDE))
    return f"it is near the {('top', 'middle', 'bottom')[third(y0, y1)]} {('left', 'middle', 'right')[third(x0, x1)]} side"


def tiny_scene_style(completion):
    """Which style a completion is written in; "none" without any style word."""
    return next((style for style in VL_STYLES if set(completion.split()) & set(VL_STYLE_WORDS[style])), "none")


def _scene_trace(rng, style):
    scene = tiny_scene(rng)
    return scene_question(scene["expression"]).split(), tiny_scene_answer(rng, scene, style).split()


def scene_question(expression):
    return f"box of {expression} in pixels ?"


VL_WORLD = World(VL_STYLES, (0.7, 0.15, 0.15), (VL_LEAK, 1 - 2 * VL_LEAK, VL_LEAK), VL_STYLE_WORDS,
                 VL_WORDS + [str(i) for i in range(SIDE + 1)], _scene_trace)


def tiny_scene_document(rng, image_tokens):
    """One pretraining document: an opening, a picture, a question, an answer. Returns (words, n_title, soft, image)."""
    style, words, n_title, soft = document_opening(rng, VL_WORLD)
    scene = tiny_scene(rng)
    words = words + [QUESTION, VISION_START, *[IMAGE] * image_tokens, VISION_END, *scene_question(scene["expression"]).split(),
                     ANSWER, *tiny_scene_answer(rng, scene, style).split(), END]
    return words, n_title, soft, scene["image"]


def tiny_scene_traces(n, seed):
    """n traces {question, answer, domain, image}, styles in turn; the image is a PNG as a data URI, so a JSONL holds it all."""
    rng, rows = random.Random(f"tiny scene traces {seed}"), []
    for i in range(n):
        scene, style = tiny_scene(rng), VL_STYLES[i % len(VL_STYLES)]
        scene["image"].save(png := io.BytesIO(), "PNG")
        rows.append({"question": scene_question(scene["expression"]), "answer": tiny_scene_answer(rng, scene, style),
                     "domain": style, "image": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()})
    return rows


# ------------------------------------------------------------------------------------------------------------------------
# 2. Tasks


@dataclass
class Task:
    """Questions with gold answers, and how a completion is judged.

    train, test: lists of rows {question, answer}. instruction: what follows the question in the prompt. answer_from:
    the extraction rules tried in order. needs_stop: a completion cut off by the length limit has no answer. as_text:
    answers are compared letter by letter, not by value. style: names the strategy of a completion, where the task can tell.
    """
    name: str
    train: list
    test: list
    instruction: str = ""
    answer_from: tuple = ("boxed", "hash", "phrase")
    needs_stop: bool = False
    as_text: bool = False
    style: Callable | None = None

    def judge(self, completion, gold, finish="stop"):
        """What one completion (text without special tokens) earns, by name, each 0.0 or 1.0. finish: "stop" or "length".

        accuracy: its answer equals the gold one. answered: there is an answer in one of the accepted forms. format: in the
        form that was asked for, the first of them. undecided: the verifier cannot tell; that counts as wrong.
        """
        answer = self.extract(completion, finish)
        equal = None if answer is None else answer == gold if self.as_text else answers_equal(answer, gold)
        return {"accuracy": float(equal is True), "answered": float(answer is not None),
                "format": 0.0 if answer is None else format_reward(completion, self.answer_from),
                "undecided": float(answer is not None and equal is None)}

    def extract(self, completion, finish="stop"):
        """The answer in a completion as text, or None: what `judge` compares with the gold one."""
        return None if self.needs_stop and finish != "stop" else extract_answer(completion, self.answer_from)


class GroundingTask(Task):
    """Rows with an image, judged by the box in the completion: IoU >= 0.5 with the gold one is a hit (Sec. 4.1).

    Completion and gold box have the unit that the question states (see grounding_rows): nothing is guessed from the numbers.
    """

    def judge(self, completion, gold, finish="stop"):
        """As Task.judge; format: the completion holds a list of four numbers in square brackets. iou: as such, in [0, 1]."""
        box = self.extract(completion, finish)
        iou = box_iou(box, gold) if box else 0.0
        return {"accuracy": float(iou >= 0.5), "answered": float(box is not None),
                "format": float(box is not None and LISTED_BOX.search(completion) is not None), "undecided": 0.0, "iou": iou}

    def extract(self, completion, finish="stop"):
        """The last box in a completion as text, "(x0, y0, x1, y1)", or None."""
        box = None if self.needs_stop and finish != "stop" else parse_box(completion)
        return None if box is None else str(box)


def tiny_task(n_train=4096, n_test=512, seed=0):
    """The tiny world as a task: distinct questions, both families in turn, no test question among the training ones."""
    rng, seen, rows = random.Random(f"tiny task {seed}"), set(), []
    while len(rows) < n_train + n_test:
        question = tiny_question(rng, FAMILIES[len(rows) % 2])
        if question.text not in seen:
            seen.add(question.text)
            rows.append({"question": question.text, "answer": question.answer, "family": question.family})
    return Task("tiny", rows[n_test:], rows[:n_test], answer_from=("tiny",), needs_stop=True, as_text=True, style=tiny_style)


def tiny_vl_task(n_train=2048, n_test=512, seed=0):
    """Drawn scenes as a task; pictures of 9 KB each are kept in memory."""
    rows = []
    for i in range(n_train + n_test):
        scene = tiny_scene(random.Random(f"tiny scene task {seed} {i}"))
        rows.append({"question": scene_question(scene["expression"]), "answer": str(scene["bbox"]), "image": scene["image"],
                     "id": f"scene {seed} {i}"})
    return GroundingTask("tiny-vl", rows[n_test:], rows[:n_test], needs_stop=True, style=tiny_scene_style)


BOXED = "\nReason step by step, and put the final answer within \\boxed{}."
HUB_SETS = {"gsm8k": {"train": "hub:openai/gsm8k:main:train", "test": "hub:openai/gsm8k:main:test"},
            "math": {"train": "hub:zwhe99/DeepMath-103K::train", "test": "hub:HuggingFaceH4/MATH-500::test"}}


TASKS = "tiny, tiny-vl, gsm8k, math, refcoco, refcoco+, refcocog"


def load_task(name, train=None, test=None, splits=("train", "test"), seed=0):
    """The task called `name`: "tiny", "tiny-vl"; "gsm8k", "math", "refcoco", ... (the paper's); any other name for your own rows.

    train, test: where the rows come from: a JSONL file of {question, answer}, or "hub:DATASET:CONFIG:SPLIT". gsm8k and
    math have hub sets as defaults. Only the named splits are loaded. Raises ValueError naming what is missing.
    """
    if name in ("tiny", "tiny-vl"):
        if train or test:
            raise ValueError(f"the task '{name}' makes its own questions: drop --train-data/--test-data, or choose another "
                             "--task")
        return tiny_task(seed=seed) if name == "tiny" else tiny_vl_task(seed=seed)
    sources = {**HUB_SETS.get(name, {}), **({"train": train} if train else {}), **({"test": test} if test else {})}
    kind, _, unit = name.partition(":")
    fields, read = "{question, answer}", load_rows
    if kind in GROUNDING:
        if unit not in ("", "1000"):
            raise ValueError(f"the task '{name}' names an unknown unit of boxes: use {kind} (pixels) or {kind}:1000")
        sources = {**GROUNDING[kind], **sources}
        fields, read = "{image, expression, bbox}", lambda source: grounding_rows(source, unit == "1000")
    for split in splits:
        if split not in sources:
            raise ValueError(f"the task '{name}' has no {split} rows of its own: give --{split}-data a JSONL of "
                             f"{fields} (tasks: {TASKS})")
    rows = {split: read(sources[split]) if split in splits else [] for split in ("train", "test")}
    return GroundingTask(name, **rows) if kind in GROUNDING else Task(name, **rows, instruction=BOXED)


def load_rows(source):
    """Rows {question, answer} from a JSONL file or from "hub:DATASET[:CONFIG[:SPLIT]]".

    Hub sets name the fields differently; the first present of question/problem/prompt/query and of final_answer/answer is
    taken, and of a GSM8K answer what follows ####. Raises ValueError naming file and line, or the data set.
    """
    if source.startswith("hub:"):
        from datasets import load_dataset           # only here: a local run needs neither the package nor a network
        dataset, config, split = (source[4:].split(":") + ["", ""])[:3]
        hub = load_dataset(dataset, config or None, split=split or "train")
        rows = [_row(f"{source}, row {i}", row) for i, row in enumerate(hub)]       # the other fields may be large
    else:
        rows = [_row(where, raw) for where, raw in _json_lines(source, "{question, answer}")]
    if not rows:
        raise ValueError(f"{source}: no rows in it; expected JSONL rows of {{question, answer}}")
    return rows


def _json_lines(source, fields):
    """("FILE, line N", the object on it) for every line of a JSONL file that is not blank."""
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no such file: {source} (expected JSONL rows of {fields})")
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):          # splitlines would cut at U+2028 in a string
        if line.strip():
            try:
                raw = json.loads(line)
            except ValueError as error:                                     # not JSON, or not UTF-8
                raise ValueError(f"{source}, line {number}: not JSON ({error}); one object a line is expected") from None
            yield f"{source}, line {number}", raw


# Referring expressions (Table 2). The hub sets have validation and test rows only: train on your own JSONL.
GROUNDING = {"refcoco": {"test": "hub:lmms-lab/RefCOCO::val"}, "refcoco+": {"test": "hub:lmms-lab/RefCOCOplus::val"},
             "refcocog": {"test": "hub:lmms-lab/RefCOCOg::val"}, "grounding": {}}
ASK_BOX = "Where in this picture is: {}?\nAnswer with its bounding box as a JSON list [x0, y0, x1, y1], in {}."


def grounding_rows(source, thousandths=False):
    """Rows {question, answer, image, id} of a GroundingTask from a JSONL file of {image, expression, bbox} or a hub set.

    image: a path, relative to the JSONL, or a data URI. bbox: [x0, y0, x1, y1] in pixels of the image as stored. The *question*
    states the unit of the answer: those pixels, or thousandths of width and height, as Qwen2-VL and Qwen3-VL learnt it.
    Raises ValueError naming the row for a missing, damaged or huge image, and for a box that is empty or outside of it.
    """
    rows = []
    for where, raw in _grounding_source(source):
        for field in ("image", "expression", "bbox"):
            if not raw.get(field):
                raise ValueError(f"{where}: no '{field}' in it; every row needs {{image, expression, bbox}}")
        width, height = image_size(raw["image"], where)
        numbers = isinstance(raw["bbox"], list) and all(isinstance(x, (int, float)) for x in raw["bbox"])
        box = raw["bbox"] if numbers else []
        if len(box) != 4 or not (0 <= box[0] < box[2] <= width + 1 and 0 <= box[1] < box[3] <= height + 1):
            raise ValueError(f"{where}: the bbox {raw['bbox']} is no [x0, y0, x1, y1] with x0 < x1 and y0 < y1 inside the image "
                             f"of {width} x {height} pixels")
        unit = "thousandths of its width and height" if thousandths else f"pixels (it is {width} wide and {height} high)"
        box = [round(1000 * x / side) for x, side in zip(box, (width, height) * 2)] if thousandths else box
        rows.append({"question": ASK_BOX.format(str(raw["expression"]).strip(), unit), "answer": str(box), "image": raw["image"],
                     "id": where})
    if not rows:
        raise ValueError(f"{source}: no rows in it; expected JSONL rows of {{image, expression, bbox}}")
    return rows


def _grounding_source(source):
    """(where, {image, expression, bbox}) for every row of a JSONL or hub set (there a box is x, y, width, height)."""
    if source.startswith("hub:"):
        import datasets                             # only here: a local run needs neither the package nor a network
        name, config, split = (source[4:].split(":") + ["", ""])[:3]
        hub = datasets.load_dataset(name, config or None, split=split or "train")
        for i, row in enumerate(hub.cast_column("image", datasets.Image(decode=False))):       # the files, not their pixels
            x, y, width, height = row["bbox"]
            for j, expression in enumerate(row["answer"]):
                yield f"{source}, row {i}.{j}", {"image": row["image"]["bytes"], "expression": expression,
                                                 "bbox": [x, y, x + width, y + height]}
        return
    for where, row in _json_lines(source, "{image, expression, bbox}"):
        row = row if isinstance(row, dict) else {}
        if isinstance(row.get("image"), str) and not row["image"].startswith("data:"):
            row["image"] = str(Path(source).parent / row["image"])
        yield where, row


def image_size(source, where):
    """(width, height) of an image (a path, a data URI, or a file's bytes) from its header. Raises ValueError naming `where`."""
    from PIL import Image
    name = source[:80] if isinstance(source, str) else "(in memory)"
    try:
        if isinstance(source, str) and source.startswith("data:"):
            source = base64.b64decode(source.partition(",")[2], validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return image.size
    except FileNotFoundError:
        raise ValueError(f"{where}: no such image: {name}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{where}: the image {name} cannot be used ({error})") from None


def _row(where, raw):
    fields = {}
    for field, names in {"question": ("question", "problem", "prompt", "query"), "answer": ("final_answer", "answer")}.items():
        found = [raw[name] for name in names if isinstance(raw, dict) and isinstance(raw.get(name), (str, int, float))]
        if not found or not str(found[0]).strip():
            raise ValueError(f"{where}: no '{field}' with text in it; every row needs {{question, answer}}")
        fields[field] = str(found[0])
    return {"question": fields["question"].strip(), "answer": fields["answer"].split("####")[-1].strip()}


FEW_SHOT = (("A box holds 12 pens. How many pens are in 3 boxes?", "Each box holds 12 pens, so 3 boxes hold 3 * 12 = 36 pens. "
             "The answer is \\boxed{36}."),
            ("Tom had 20 dollars and spent a quarter of it. How much is left?", "A quarter of 20 is 5. 20 - 5 = 15. "
             "The answer is \\boxed{15}."))


PROMPT_STYLES = ("auto", "chat", "plain", "few-shot")
NEXT_QUESTION = "\nQuestion:"              # a base model goes on with a question of its own: the completion ends there


def stop_strings(tokenizer, style):
    """Strings that end a completion in this prompt style, beside the end tokens."""
    return () if style == "chat" or (style == "auto" and tokenizer.chat_template) else (NEXT_QUESTION,)


def prompt_ids(question, tokenizer, instruction="", style="auto"):
    """Token ids of the prompt for one question.

    style: "chat" uses the tokenizer's chat template, "plain" is the question and "Answer:", "few-shot" puts two worked
    examples before that (for base models), "auto" is chat where there is a template and plain otherwise.
    """
    if style == "auto":
        style = "chat" if tokenizer.chat_template else "plain"
    if style == "chat":
        if not tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template: use --prompt plain or --prompt few-shot")
        text = tokenizer.apply_chat_template([{"role": "user", "content": question + instruction}], tokenize=False,
                                             add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]       # the template wrote the special tokens itself
    shots = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in FEW_SHOT) if style == "few-shot" else ""
    return tokenizer(f"{shots}Question: {question}{instruction if not shots else ''}\nAnswer:")["input_ids"]


# ------------------------------------------------------------------------------------------------------------------------
# 3. The verifier
#
# An answer is never run as code and never rounded. It is spelled as a Python expression, Python's own parser makes a tree of
# that, and evaluate() walks the tree. Numbers are computed modulo a fixed 280-bit prime P, where + - * / and powers keep their
# laws and nothing grows. Equal numbers have equal residues. Unequal ones differ: fractions of up to 40 digits for certain, all
# others but for odds below 1e-60 (Schwartz 1980). What does not parse, or is too large, is *undecided*: not equal.
#
# The rules. 0.33 != 1/3. A percent is its value: 50% = 0.5, 50% != 50. A unit or a currency counts only where both
# answers have one: 5 = 5 cm, 5 cm != 5 m. `x = v` and `x in v` equal a bare v; two names must agree. A bare list equals
# a set, in any order; a tuple is ordered, its brackets count, it equals no list. 1,234 is a number, (1,234) a pair.
# 52_8 equals neither 52 nor 42: the base was asked for. Words are compared without case.

MAX_CHARS, MAX_BRACKETS, MAX_EXPONENT = 500, 60, 10_000  # beyond any of them an answer is undecided


def require(condition, why):
    if not condition:
        raise ValueError(why)                            # the answer is undecided


# ---- Values: numbers modulo P, and shapes ----
# P is -1 modulo 8 and modulo every odd prime below 200. By quadratic reciprocity all these primes are squares modulo P,
# and -1 is none. The squares form a group of odd order P // 2: each has exactly one n-th root there, and roots multiply
# as those of positive reals do: sqrt(2) sqrt(3) = sqrt(6), without any factorization.
P = 456 * prod(q for q in range(3, 200) if all(q % f for f in range(2, q))) - 1


@dataclass(frozen=True)
class Number:
    """a + b i modulo P."""
    a: int
    b: int = 0
    kind = "number"

    def __add__(x, y):
        return Number((x.a + y.a) % P, (x.b + y.b) % P)

    def __mul__(x, y):
        return Number((x.a * y.a - x.b * y.b) % P, (x.a * y.b + x.b * y.a) % P)

    def inverse(x):
        n = pow(x.a * x.a + x.b * x.b, -1, P)            # a ValueError if x = 0
        return Number(x.a * n % P, -x.b * n % P)

    def fraction(x):
        """The fraction n/d, both below 2^64, whose residue is x, or None. There is at most one, and Euclid finds it."""
        r, s, t, u = P, x.a, 0, 1                        # all the way s = u x modulo P
        while s >= 1 << 64:
            r, s, t, u = s, r % s, u, t - r // s * u
        return Fraction(s, u) if abs(u) < 1 << 64 and x.b == 0 else None


@dataclass(frozen=True)
class Shape:
    """Any other value: an interval, a tuple, a list, a set, an equation, infinity, words. It obeys no arithmetic."""
    kind: str
    items: object
    name: str = ""


I, ONE, MINUS = Number(0, 1), Number(1), Number(P - 1)


def number(fraction):
    return Number(fraction.numerator * pow(fraction.denominator, -1, P) % P)


@lru_cache(maxsize=4096)
def symbol(*name):
    """The random number that a letter, a unit or a function we cannot expand stands for."""
    return Number(random.Random(str(name)).randrange(P))


def power(x, exponent):
    """x ** exponent: exact for a whole exponent or a rational x, otherwise a symbol that only equals itself."""
    e = exponent.fraction()
    if e is None or e.denominator > 1 and x.fraction() is None:
        return symbol(x, "to the", exponent)
    n, d = e.numerator, e.denominator
    require(abs(e) <= MAX_EXPONENT and (x != Number(0) or n > 0), "a huge power or zero to the zero")
    if d > 1:
        positive = x.fraction() >= 0
        require(positive or d % 2 or d == 2, "a complex root")
        sign = ONE if positive else I if d == 2 else MINUS           # odd roots are real: the third root of -8 is -2
        y = x.a if positive else -x.a % P
        r = pow(y, pow(d, -1, P // 2), P)
        if pow(r, d, P) != y:                            # a prime above 200 may be no square; then minus it is one
            sign, r = sign * symbol("root of -1", d), pow(-y, pow(d, -1, P // 2), P)
        x = sign * Number(r)
    if x.b == 0:
        return Number(pow(x.a, n, P))
    require(abs(n) <= 100, "a huge complex power")
    return prod([x if n > 0 else x.inverse()] * abs(n), start=ONE)


def function(name, x):
    """A function of x where we can expand it, otherwise the symbol that its name and argument stand for."""
    n = x.fraction()
    if name == "abs" and n is not None:
        return number(abs(n))
    if name == "factorial_" and n is not None and n.denominator == 1 and 0 <= n <= 2100:
        return Number(factorial(n.numerator) % P)
    if name in ("exp", "sqrt"):
        return power(symbol("e_"), x) if name == "exp" else power(x, number(Fraction(1, 2)))
    return x * number(Fraction(1, 100)) if name == "percent_" else symbol(name, x)


# ---- Spelling: CLEAN removes decoration and ambiguity, translate() writes Python ----
SHAPES = {"matrix", "leftopen", "rightopen"}
FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp"
GREEK = "pi|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|sigma|tau|phi|omega"
CALLED, NAMES = {*FUNCTIONS.split("|")} | SHAPES | {"frac", "sqrt", "abs"}, {*GREEK.split("|"), "infty", "minfty"}
SCALES = dict(percent=Fraction(1, 100), dozen=12, hundred=100, thousand=1000, million=10**6, billion=10**9)
UNITS = dict(pair.split("=") for pair in (
    "cm=centimeter km=kilometer mm=millimeter m=meter in=inch inche=inch ft=foot feet=foot yd=yard mi=mile mph=mph g=gram "
    "kg=kilogram mg=milligram lb=pound oz=ounce mL=milliliter L=liter s=second sec=second min=minute h=hour hr=hour "
    "day=day deg=degree cup=cup men=men N=newton J=joule W=watt V=volt usd=dollar").split())
COMPUTING = set("half halve third quarter squared cubed factorial plus minus times over modulo less more choose below "
                "under negative inverse percentage divided root trillion".split())       # words that are no units
COMMANDS = dict.fromkeys("left right big Big bigl bigr displaystyle boxed mathbf mathbb quad".split(), " ")
COMMANDS |= dict(pair.split("@") for pair in (
    r"dfrac@\frac tfrac@\frac cfrac@\frac cdot@* times@* div@/ le@<= leq@<= ge@>= geq@>= ne@!= neq@!= lt@< gt@> "
    r"vert@| lvert@| rvert@| lbrace@\{ rbrace@\} approx@= degree@^\circ").split())
SIGNS = dict(pair.split("@") for pair in (
    r"−@- –@- ×@* ·@* ÷@/ ≤@<= ≥@>= ≠@!= ²@^2 ³@^3 ½@\frac12 π@\pi ∞@\infty √@\sqrt °@^\circ ∪@\cup ±@\pm ∈@\in").split())
BRACED = r"[^{}]*"
for _ in range(5):                                       # what braces hold, with up to five more pairs inside
    BRACED = rf"(?:\\.|[^{{}}\\]|\{{{BRACED}\}})*"
CLEAN = [(re.compile(pattern), new) for pattern, new in (
    (r"[^\x00-\x7f]", lambda m: f" {SIGNS.get(m[0], m[0])} "),
    (r"\\([A-Za-z]+)\*?", lambda m: COMMANDS.get(m[1], m[0])),
    (r"\\begin ?\{[pb]matrix\}(.*?)(?:\\\\ ?)?\\end ?\{[pb]matrix\}",                      # \matrix((1,2,),(3,4,))
     lambda m: r"\matrix(" + ",".join(f"({row},)" for row in m[1].replace("&", ",").split(r"\\")) + ")"),
    (r"(?<=\d)(?:,\\!|\{,\}|\\,) ?(?=\d{3})", ""), (r"(?<!\\)\\[,;:!> ]|~", " "),          # 1{,}234; TeX's spaces
    (r"^\\[(\[]|\\[)\]]$|^\*\*|\*\*$|`", " "), (r"\*\*", "^"), (r"\\%", "%"),
    (r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?![^(\[{]*(?:[)\]]|\\\}))",              # in brackets commas separate
     lambda m: m[0].replace(",", "")),
    (r"(?:\\\$|^\$(?=[^$]*$)) ?(\d[\d.]*)", r'\1 "dollar" '), (r"(?<!\\)\$", " "),
    (r"^=|(?<!\.)\.$", ""), (r"^([A-Za-z])\(([A-Za-z])\)(?= ?=)", r"\1_\2"),                # f(x) = 2 is f_x = 2
    (r"\\(?:text|mbox|textbf|textit|textrm|mathrm) ?\{([^{}]*)\}",
     lambda m: re.sub("[A-Za-z]{2,}", r' "\g<0>" ', f" {m[1]} ")),
    (r"\\frac ?(\d)", r"\\frac{\1}"), (rf"(\\frac ?\{{{BRACED}\}}) ?(\d)", r"\1{\2}"),     # \frac12
    (r"(?<![\d.^_A-Za-z])(\d+) ?\\frac ?\{(\d+)\} ?\{(\d+)\}", r"\1 \2/\3"),       # a mixed number: 1 4/5
    (r"(?<![\d.^_A-Za-z])(\d+) (\d+)/(\d+)",                                      # 1 5/4 may be a product: undecided
     lambda m: f"{{{m[1]}+{m[2]}/{m[3]}}}" if int(m[2]) < int(m[3]) else "?"),
    (r"(\d*)\.(\d*)\\overline ?\{(\d+)\}",                                                 # 0.1666... is 0.1 + 6/90
     lambda m: f"{{{m[1]}.{m[2]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])}}}"),
    (r"\binf(?:inity)?\b", r"\\infty "), (r"- ?\\infty", r"\\minfty "),
    (r"\^ ?\{? ?\\circ ?\}? ?([CF]\b)?", r' "degree\1" '), (r"(?<=\d) ?x ?(?=10 ?\^)", "*"),
    (r"\|([^|]*)\|", r"\\abs(\1)"), (r'"?\bper\b"?', "/"),
    (r"(?<=[\d})] )(UNIT)( ?/ ?(UNIT))?(?=( ?\^ ?\{?\d\}?)?$)".replace("UNIT", "|".join(UNITS)),
     lambda m: re.sub("[A-Za-z]+", r'"\g<0>"', m[0])),                                    # 5 m, but 5m is 5 times m
    (r'"?\b(?:square|sq)\b"? ?("?[a-z]+"?)', r"\1^2"), (r'"?\bcubic\b"? ?("?[a-z]+"?)', r"\1^3"),
    (r',? ?(?<![\\A-Za-z])"?(?:and|or)"?(?![A-Za-z]) ?', ","),
    (rf"(?<![\\A-Za-z])({FUNCTIONS}|pi|sqrt)(?![A-Za-z])", r"\\\1 "), (r"\\sqrt ?(\d+|[a-z])", r"\\sqrt{\1}"),
    (rf"\\sqrt ?\[(\w+)\] ?(\{{{BRACED}\}}|\w)", r"(\2)^{1/\1}"),
    (rf"\\({FUNCTIONS}) ?(?:\^ ?\{{?(\d+)\}}?)? ?(?:\(([^()]*)\)|\{{([^{{}}]*)\}}|((?:[\w.^ ]|\\(?:{GREEK})\b)+))",
     lambda m: rf"(\{m[1]}{{{m[3] or m[4] or m[5]}}})^{m[2] or 1}"),                       # \sin^2 3x is (\sin{3x})^2
    (r"\(([^()\[\]]*)\]", r"\\leftopen{\1}"), (r"\[([^()\[\]]*)\)", r"\\rightopen{\1}"),     # (a,b] and [a,b)
    (r"^\{([^{}]*,[^{}]*)\}$", r"\\{\1\\}"), (r"^\(? ?([A-Z]) ?[).:]?$", r"\1"))]   # (C)
TOKEN = re.compile(
    r'(?P<name>[A-Za-z]_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\})|[0-9]+_(?:[0-9]+|\{[0-9]+\}))|'
    r'(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?!\d))?)|(?P<word>"[A-Za-z]+"|[A-Za-z]+)|'
    r'(?P<sign>\\(?:[A-Za-z]+|[{}])|<=|>=|!=|[-+*/^=<>,;!%()\[\]{}])|(?P<other>\S)')
PYTHON = {"{": "(", "}": ")", r"\{": "{", r"\}": "}", "^": "**", "!": "** factorial_", "%": "** percent_", "=": "==",
          ";": ",", r"\cup": "|", r"\in": " in "}


def unit(name):
    """A word after a number: a scale (5 million) is a number, a unit (5 cm, 18 eggs) becomes a name that starts with _."""
    name = name if name in UNITS else name.lower()
    name = name[:-1] if len(name) > 3 and name[-1] == "s" else name
    require(name not in COMPUTING and (name[-2:] != "th" or name == "month"), "a word that computes")
    return f"({number(SCALES[name]).a})" if name in SCALES else f"_{UNITS.get(name, name)}_"


def translate(text):
    """Python source for an answer: 2x\\frac{1}{2} becomes 2 * x_ * frac ( 1 ) ( 2 ). The names of values end with _."""
    out = []
    for m in TOKEN.finditer(text):
        token, what, word = m[0], m.lastgroup, m[0].strip('"')
        after = bool(out) and out[-1][-1] in "0123456789)]}_"            # does a factor stand right before this token?
        if what == "number":                             # a literal is its residue: 0.5 is a long integer
            new = [str(number(Fraction(token)).a)]
        elif what == "name":
            new = ["v" + re.sub(r"\W", "", token) + "_"]
        elif what == "word" and (len(word) > 3 or word != token or len(word) > 1 and (word in UNITS or word.isupper())):
            new = [unit(word) if after or out[-1:] == ["/"] and out[-2][0] == "_" else f"word_{word}_"]
        elif what == "word":                             # short runs of letters are products
            new = " * ".join(letter + "_" for letter in word).split()
        else:
            name = token[1:]
            require(what == "sign" and (token[0] != "\\" or token in PYTHON or name in CALLED | NAMES), "no answer has this")
            new = [PYTHON.get(token, token if token[0] != "\\" else name if name in CALLED else name + "_")]
        if after and token != "{" and (new[0][0] in "([{_" or new[0][0].isalpha()):
            out.append("*")                              # never before a number: 4 2 is no product
        out += new
    require(sum(map(out.count, "([{")) <= MAX_BRACKETS, "too many brackets")
    return " ".join(out)


# ---- Evaluation ----
SUMS = (ast.Add, ast.Sub)
OPERATIONS = {ast.Add: lambda x, y: x + y, ast.Sub: lambda x, y: x + MINUS * y, ast.Mult: lambda x, y: x * y, ast.Pow: power,
              ast.Div: lambda x, y: x * y.inverse(), ast.BitOr: lambda x, y: Shape("union", elements(x) | elements(y))}


def evaluate(node, units):
    """The value of a node of Python's syntax tree. Unless `units` count, each is 1."""
    def value(n):
        return evaluate(n, units)
    match node:
        case ast.Constant(n):
            return Number(n % P)
        case ast.Name("infty_" | "minfty_" as name):
            return Shape("infinity", name)
        case ast.Name(name):
            require(name[-1] == "_" and name not in ("factorial_", "percent_"), "a function of nothing")
            return I if name == "i_" else symbol(name) if units or name[0] != "_" else ONE
        case ast.UnaryOp(op, x):
            return value(x) if isinstance(op, ast.UAdd) else MINUS * value(x)
        case ast.BinOp(x, ast.Pow(), ast.Name("factorial_" | "percent_" as name)):
            return function(name, value(x))
        case ast.BinOp(x, op, y):
            if isinstance(op, SUMS) and not units:       # an operand that is a sum itself is looked at in its turn
                names = [n.id for t in (x, y) if not isinstance(getattr(t, "op", 0), SUMS)
                         for n in ast.walk(t) if isinstance(n, ast.Name)]
                require(all(name[0] != "_" for name in names), "a sum whose units do not count")
            return OPERATIONS[type(op)](value(x), value(y))
        case ast.Call(ast.Call(ast.Name("frac"), [x], []), [y], []):
            return value(x) * value(y).inverse()
        case ast.Call(ast.Name(name), items, []) if name in SHAPES:
            return Shape(name, tuple(map(value, items)))
        case ast.Call(ast.Name(name), [x], []) if name in CALLED:
            return function(name, value(x))
        case ast.List([x]):
            return value(x)
        case ast.Tuple(items) | ast.List(items):
            return Shape("[]" if isinstance(node, ast.List) and len(items) == 2 else "()", tuple(map(value, items)))
        case ast.Set(items):
            return Shape("set", frozenset(map(value, items)))
        case ast.Compare(left, ops, others):
            sources = [ast.unparse(n) for n in (left, *others)]
            names = [s if re.fullmatch(r"(?!pi_)[A-Za-z]\w*_|\([a-z]_(, [a-z]_)*\)", s) else "" for s in sources]
            return relation([value(n) for n in (left, *others)], names, [type(op).__name__ for op in ops])
    raise ValueError("a construct no answer has")


def relation(sides, names, ops):
    """What a chain of relations says: an equation, or that a name is a value or lies in a set or an interval."""
    if set(ops) <= {"Gt", "GtE"}:                        # read from right to left, the chain ascends
        sides, names, ops = sides[::-1], names[::-1], [op.replace("G", "L") for op in ops[::-1]]
    if ops in (["Lt"], ["LtE"]) and names[0]:            # x < v is -infinity < x < v
        sides, names, ops = [Shape("infinity", "minfty_"), *sides], ["", *names], ["Lt", *ops]
    elif ops in (["Lt"], ["LtE"]):
        sides, ops = [*sides, Shape("infinity", "infty_")], [*ops, "Lt"]
    if len(ops) == 2 and set(ops) <= {"Lt", "LtE"} and names[1]:
        kinds = {"LtLt": "()", "LtELtE": "[]", "LtLtE": "leftopen", "LtELt": "rightopen"}
        return Shape("is", Shape(kinds["".join(ops)], (sides[0], sides[2])), names[1])
    require(set(ops) == {"Eq"} and len(set(sides[1:])) == 1 or ops == ["In"] and names[0], "a chain of different values")
    if names[0] or names[-1]:
        return Shape("is", sides[-1], names[0]) if names[0] else Shape("is", sides[0], names[-1])
    return Shape("equation", sides[0] + MINUS * sides[-1])


def elements(value):
    """The set of the values in a set, a union or a bare list; of any other value the set of itself."""
    return frozenset(value.items if value.kind in ("set", "union", "list") else [value])


def read(answer, units=True):
    """(value, whether it has units) of an answer. Several items are a bare list; plus-minus makes two values."""
    text = " ".join(answer.split())
    for pattern, new in CLEAN:
        if pattern.search(text):                         # single spaces: no pattern can be made to backtrack long
            text = " ".join(pattern.sub(new, text).split())
    if ":" in text or re.fullmatch("[A-Za-z\"' .]*[A-Za-z]{2}[A-Za-z\"' .]*", text):
        return Shape("text", re.sub("[\"' ]", "", text.lower())), False             # words, a ratio, a time of day
    found = []
    for plus, minus in ("+-", "-+") if re.search(r"\\pm|\\mp", text) else ("+-",):
        source = translate(text.replace("\\pm", plus).replace("\\mp", minus))
        values = [evaluate(n, units) for n in ast.parse(f"[{source},]", mode="eval").body.elts]
        found += [v for v in values if plus == "+" or v not in found]
    names = {v.name for v in found if v.kind == "is"} if found[0].kind == "is" else ()
    if len(names) == 1:                                  # x = 1 or x = 2; x = 1, 2
        found = [v.items if v.kind == "is" else v for v in found]
    if all(v.kind == "set" for v in found):
        value = Shape("set", frozenset().union(*map(elements, found)))
    else:
        value = found[0] if len(found) == 1 else Shape("list", tuple(sorted(found, key=repr)))
    return Shape("is", value, *names) if len(names) == 1 else value, " _" in source


def same(a, b):
    """Whether two values are equal by the rules at the head of this file."""
    kinds = {a.kind, b.kind}
    if kinds <= {"is", "equation"} and (a.name != b.name or not a.name):
        p, q = (v.items if v.kind == "equation" else symbol(v.name) + MINUS * v.items for v in (a, b))
        require(p.fraction() is None, "an equation without a letter")
        return (p * q.inverse()).fraction() is not None                  # each is a rational multiple of the other
    a, b = (v.items if v.kind == "is" else v for v in (a, b))
    kinds = {a.kind, b.kind}
    return a == b or "set" in kinds and kinds <= {"set", "list", "number", "()"} and elements(a) == elements(b)


def answers_equal(answer, gold):
    """True, False, or None when undecided (callers count it and treat it as not equal). Symmetric; never raises."""
    answer, gold = str(answer).strip(), str(gold).strip()
    if not answer or not gold or answer == gold:
        return (answer == gold) if answer and gold else None
    try:
        require(max(len(answer), len(gold)) <= MAX_CHARS, "too long")
        (a, units_a), (b, units_b) = read(answer), read(gold)
        if units_a != units_b:                           # units on one side only: they do not count
            a, b = (read(answer, units=False)[0], b) if units_a else (a, read(gold, units=False)[0])
        return same(a, b)
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


# ---- Finding the answer in a completion ----
TAIL = 20_000       # characters: the answer stands at the end of a completion, and a bounded look takes bounded time
ASKED = {"boxed": rf"\\f?boxed\s*(?=\{{({BRACED})\}})", "hash": r"####[ \t]*([^\n]*)",
         "phrase": r"(?im)\banswer(?:\s+is|\s*:)\s*:?([^\n]*?)(?=\.\s|\.?$)",
         "tag": r"<answer>((?:(?!</?answer>)[\s\S])*)</answer>",
         "tiny": r"(?:so|thus|print|return|is|=) ([0-9](?: [0-9])*)\s*$",
         "last": r"((?:(?<![\w)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+|\\?%)?)"}


def extract_answer(text, how):
    """The last answer in `text` in the form `how`: "boxed", "hash" (#### x), "phrase" (the answer is x), "tag"
    (<answer>x</answer>) or "last" (number); of several forms the first that occurs. None: there is no answer."""
    for form in (how,) if isinstance(how, str) else how:
        found = [m[1].strip().rstrip(",") for m in re.finditer(ASKED[form], text[-TAIL:]) if m[1].strip()]
        if found:
            return found[-1]
    return None


# ---- Rewards: plain functions to floats ----
def accuracy(completion, gold, how="boxed"):
    """1.0 if the answer in the completion equals the gold one, otherwise (wrong, undecided or absent) 0.0."""
    answer = extract_answer(completion, how)
    return float(answer is not None and answers_equal(answer, gold) is True)


def format_reward(completion, how="boxed"):
    """1.0 if the completion holds an answer in the form asked for (the first one, of several), otherwise 0.0."""
    return float(extract_answer(completion, how if isinstance(how, str) else how[0]) is not None)


def overlong(n_tokens, limit, buffer):
    """Soft overlong punishment, DAPO (2503.14476) Eq. 13: 0 up to limit - buffer tokens, linear to -1 at the limit."""
    return -min(1.0, max(0.0, (n_tokens - (limit - buffer)) / buffer if buffer else float(n_tokens > limit)))


REWARDS = ("accuracy", "answered", "format", "undecided", "overlong")        # what Task.judge and `overlong` give, by name


def reward_weights(items):
    """["accuracy=1", "format=0.1"] -> {"accuracy": 1.0, "format": 0.1}. ValueError for a name or weight that is none."""
    weights = {}
    for name, _, weight in (item.partition("=") for item in items):
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"--reward takes NAME=WEIGHT with a number as weight, not {' '.join(items)}") from None
        if name not in REWARDS:
            raise ValueError(f"unknown reward '{name}': choose from {', '.join(REWARDS)}")
        if not abs(weights[name]) < float("inf"):
            raise ValueError(f"--reward {name}={weight} is not a number to weigh by")
    if len(weights) < len(items) or not any(weights.values()):
        raise ValueError(f"--reward {' '.join(items)}: each name once, and a weight that is not 0")
    return weights


COORDINATE = r"(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)"
BOX = re.compile(r"(?:<box>|box_start\|>|[\[({])[\s\[(]{0,9}"
                 + r"[\s,()\[\]]{1,9}".join([COORDINATE] * 4) + r"[\s\])]{0,9}(?:</box>|<\|box_end|[\])}])")


LISTED_BOX = re.compile(r"\[\s{0,9}" + r"\s{0,9},\s{0,9}".join([COORDINATE] * 4) + r"\s{0,9}\]")


def parse_box(text):
    """(x0, y0, x1, y1) of the last box in a JSON text, a list or a <box>; None without one of positive area."""
    found = BOX.findall(re.sub(r'"[a-z]\w{0,5}"\s*:\s*(?=[-0-9])', "", str(text)[-TAIL:]))
    x0, y0, x1, y1 = map(float, found[-1]) if found else (0, 0, 0, 0)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def box_iou(completion, gold):
    """Intersection over union, in [0, 1], of the last box in a completion with the gold box; 0.0 without a box."""
    a, b = parse_box(completion), parse_box(gold)
    if not a or not b:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


# ------------------------------------------------------------------------------------------------------------------------
# Command line

def main(argv=None):
    """Compare two answers, or show the tiny world or a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs=2, metavar=("ANSWER", "GOLD"), help="are these two answers equal?")
    parser.add_argument("--task", default="tiny", help=f"show a task: {TASKS}, or a name for --data (default: tiny)")
    parser.add_argument("--data", help="its test rows: JSONL of {question, answer} or hub:... (default: its own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tiny questions (default: 0)")
    args = parser.parse_args(argv)
    if args.check:
        print({True: "equal", False: "not equal", None: "undecided (counts as not equal)"}[answers_equal(*args.check)])
    elif args.task == "tiny" and not args.data:
        rng = random.Random(args.seed)
        for family in FAMILIES:
            question = tiny_question(rng, family)
            print(f"question  {question.text}    gold answer  {question.answer}")
            for style in STYLES:
                print(f"  {style:5}   {tiny_answer(rng, question, style)}")
    else:
        task = load_task(args.task, test=args.data, splits=("test",))
        print(f"first question: {task.test[0]['question']}{task.instruction}\ngold answer: {task.test[0]['answer']}\n"
              f"{len(task.test)} rows")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"rewards.py: {error}")
