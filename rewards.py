"""Tasks, prompts, answer checking and rewards: all that the scripts know of what a right answer is.

Four parts: 1. worlds and tasks: rows {question, answer} from JSONL, the hub or a Python file;
2. prompts; 3. the verifier: answer extraction and exact equality; 4. rewards: what a completion
earns, by name, from a judge and from functions with TRL's signature; boxes.

Departs from the paper: it trains on DeepMath-103K and tests on MATH500, GSM8K, ...: `--task math`
and `--task gsm8k` here. The default tasks are made-up worlds of ours in tutorials/, which this file
knows by their paths only. No torch in this file: it can be read, and used, alone.

Run it:
    python rewards.py                                     # the default world's first question
    python rewards.py --check '\\frac{1}{2}' 0.5           # is this answer equal to that one?
    python rewards.py --task gsm8k --data PATH.jsonl      # a task, or rows of your own
"""

import argparse
import ast
import base64
import dataclasses
import importlib.util
import io
import json
import math
import operator
import random
import re
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path

import mpmath

# --------------------------------------------------------------------------------------------------
# 1. Worlds and tasks
# A *task file* is a Python file that a user names (--task my_task.py). It defines
#     load(split, seed=0) -> list of dicts      rows {question, answer, ...} of "train" or "test"
# and may define
#     judge(completion, row) -> {name: number}  with "accuracy" among the names; row["finish"] is
#                                               "stop" or "length". Without it, the verifier's
#     answer(completion, row) -> str or None    the answer in a completion, which votes count
#     style(completion) -> str                  names the strategy of a completion
#     DOMAINS = ("math", ...)                   the strategies, in the order of tables
#     INSTRUCTION = "..."                       follows the question in the prompt
#     PERCENT = "either"                        without a judge: a percent sign may be left out
# A *world* is a task file that brings a model of its own, which --model can name:
#     make_policy(folder, seed=0, steps=None)   makes folder/policy and folder/traces.jsonl
#     make_reader()                             what turns text and pictures into its input
#     finish(folder)                            called by grpo.py behind its closing table with its
#                                               run folder; makes what it likes, returns a line
#     DEFAULTS = {...}                          settings that fit it, by name

DEFAULT_WORLD = "tiny"
WORLDS = {"tiny": "tutorials/tiny_world.py", "tiny-vl": "tutorials/drawn_scenes.py"}


def file_of(name):
    """The Python file that `name` means: of a short name in WORLDS, or a path; otherwise None."""
    if name in WORLDS:
        return Path(__file__).resolve().parent / WORLDS[name]
    return Path(name) if str(name).endswith(".py") else None


def load_file(path):
    """The module in a Python file. ValueError if there is no such file, or it is broken.

    Its folder is put on sys.path, and the module into sys.modules under the file's stem, so that
    files beside it can import it; where that name is taken (json.py), under its path instead.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"no such file: {path}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))

    name = str(file)
    if file.stem.isidentifier():
        namesake = importlib.util.find_spec(file.stem)
        if namesake is None or Path(namesake.origin or "").resolve() == file:
            name = file.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            call(f"the file {path}", spec.loader.exec_module, module)
        except ValueError:
            del sys.modules[name]
            raise
    return sys.modules[name]


def call(where, function, *arguments, **keywords):
    """function(...), a user's: what it raises becomes a ValueError of one line, with `where`."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{Path(place.filename).name}, line {place.lineno}"
        raise ValueError(f"{where} fails: {type(error).__name__}: {message} ({line})") from error


def world_of(name):
    """The module of a world (a short name, or a file with make_policy); None for anything else."""
    file = file_of(name)
    module = load_file(file) if file else None
    return module if hasattr(module, "make_policy") else None


def world_root(name):
    """The folder of all that is made for a world; runs/real for any other model."""
    if name in WORLDS:
        return f"runs/{name}"
    return f"runs/{Path(name).stem}" if file_of(name) else "runs/real"


def world_defaults(name):
    """The settings that fit a world, {name of a field: value}; {} for any other model."""
    return dict(getattr(world_of(name), "DEFAULTS", {}))


def world_domains(name):
    """The names of a world's strategies, in order; () for any other model."""
    return tuple(getattr(world_of(name), "DOMAINS", ()))


def world_traces(name):
    """Where the traces of a world lie: a list of sources for vae.load_traces."""
    return [f"{world_root(name)}/base/traces.jsonl"]


def find_model(name):
    """What transformers loads for `name`: a folder, or the name itself where it is one of the hub.

    Of a finished run folder it is the policy in it; of a world its base model, which is made on the
    spot where it is missing. ValueError for a Python file that brings no model.
    """
    world = world_of(name)
    if world is None and file_of(name):
        raise ValueError(f"the file {name} brings no model: it has no function make_policy")
    folder = name if world is None else f"{world_root(name)}/base"
    is_made = Path(folder, "policy", "config.json").is_file()
    if world and not is_made:
        print(f"making {folder} with make_policy of {file_of(name)}", flush=True)
        world.make_policy(folder)
    return f"{folder}/policy" if world or is_made else name


# What the metrics and samples hold beside rewards: one of such a name would hide it.
OURS = """step rho rollouts reward advantage length stopped tokens clip_share kl loss log_ratio
entropy groups seconds prompt row question gold family domain sample completion style finish arm"""
RESERVED = set(OURS.split())


@dataclass
class Task:
    """Questions with gold answers, and functions like a task file's that judge a completion."""

    name: str
    train: list  # rows {question, answer, ...}
    test: list
    instruction: str = ""  # what follows the question in the prompt
    styles: tuple = ()  # the strategies that `style` names, in the order of tables
    judge_function: Callable | None = None  # None: judge_answer
    answer_function: Callable | None = None  # None: find_answer
    style_function: Callable | None = None  # None: strategies have no names
    is_grounding: bool = False  # an answer is a box in a picture
    thousandths: bool = False  # boxes are in thousandths of width and height, not in pixels
    reward_names: tuple = ()  # of the judge's numbers
    percent: str = "value"  # what a percent sign means to judge_answer: see answers_equal

    def __post_init__(self):
        """Learn the names of the judge's numbers: it judges an empty and a right completion."""
        self.judge_function = self.judge_function or partial(judge_answer, percent=self.percent)
        self.answer_function = self.answer_function or find_answer
        names = []
        for row in (self.train or self.test)[:1]:
            for completion in ("", str(row.get("answer", ""))):
                names += self.judge(completion, row)
            self.is_grounding |= "iou" in names and "image" in row
        self.reward_names = tuple(dict.fromkeys(names)) or self.reward_names
        hidden = RESERVED.intersection(self.reward_names)
        if hidden:
            raise ValueError(f"judge() of '{self.name}': {sorted(hidden)} are metrics of our own")

    def judge(self, completion, row, finish="stop"):
        """What one completion (text without special tokens) earns, {name: float}.

        finish: "stop", or "length" where it was cut off. The names are always reward_names: what
        the judge leaves out is 0.0, and what it did not give when the task was loaded is dropped.
        ValueError with the row's question where it does not return {name: number} with "accuracy".
        """
        where = f"judge() of the task '{self.name}', at the question {row.get('question')!r:.80},"
        result = call(where, self.judge_function, completion, {**row, "finish": finish})
        if not isinstance(result, dict) or "accuracy" not in result:
            raise ValueError(f"{where} must return a dict with an 'accuracy', not {result!r:.80}")
        numbers = dict.fromkeys(self.reward_names, 0.0)
        for name, value in result.items():
            if name in self.reward_names or not self.reward_names:
                numbers[name] = as_number(value, f"{where} must return numbers: its '{name}'")
        return numbers

    def extract(self, completion, row, finish="stop"):
        """The answer in a completion as text, or None: what votes count."""
        where = f"answer() of the task '{self.name}'"
        answer = call(where, self.answer_function, completion, {**row, "finish": finish})
        return None if answer is None else str(answer)

    def style(self, completion):
        """The name of a completion's strategy; None where strategies have no names."""
        if self.style_function is None:
            return None
        return call(f"style() of the task '{self.name}'", self.style_function, completion)


def as_number(value, where):
    """`value` as a float; ValueError for what is no finite number. A bool is one."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{where} is {value!r:.80}")
    return float(value)


BOXED = "\nReason step by step, and put the final answer within \\boxed{}."
GROUNDING = ("refcoco", "refcoco+", "refcocog", "grounding")  # boxes of expressions (Table 2)
HUB_SETS = {
    "gsm8k": {"train": "hub:openai/gsm8k:main:train", "test": "hub:openai/gsm8k:main:test"},
    "math": {"train": "hub:zwhe99/DeepMath-103K", "test": "hub:HuggingFaceH4/MATH-500::test"},
    "refcoco": {"test": "hub:lmms-lab/RefCOCO::val"},  # these have no rows to train on
    "refcoco+": {"test": "hub:lmms-lab/RefCOCOplus::val"},
    "refcocog": {"test": "hub:lmms-lab/RefCOCOg::val"},
}
PERCENT = dict.fromkeys(("gsm8k", "math"), "either")  # their own graders remove percent signs
TASKS = ", ".join([*WORLDS, *HUB_SETS, "grounding"]) + ", or a task file (my_task.py)"


def load_task(name, train=None, test=None, splits=("train", "test"), seed=0):
    """The task called `name`, with the rows of the named splits.

    name: a world or the path of a task file, which make their own rows, by the seed; gsm8k, math,
    refcoco, ... (the paper's); "grounding" or any other name for rows of your own, of BOX_FIELDS or
    TEXT_FIELDS; refcoco:1000, grounding:1000, ... for boxes in thousandths. train, test: where rows
    come from, a JSONL file or "hub:DATASET:CONFIG:SPLIT". ValueError for anything malformed.
    """
    if file_of(name):
        if train or test:
            raise ValueError(f"the task '{name}' makes its own questions: it takes no other rows")
        return load_task_file(name, splits, seed)

    kind, _, unit = name.partition(":")
    is_grounding = kind in GROUNDING
    if is_grounding and unit not in ("", "1000"):
        raise ValueError(f"{name}: an unknown unit of boxes: use {kind} (pixels) or {kind}:1000")
    fields = BOX_FIELDS if is_grounding else TEXT_FIELDS
    sources = dict(HUB_SETS.get(kind if is_grounding else name, {}))
    for split, source in (("train", train), ("test", test)):
        if source:
            sources[split] = source
    for split in splits:
        if split not in sources:
            what_to_do = f"give a JSONL of {fields} by --{split}-data or NAME=FILE (tasks: {TASKS})"
            raise ValueError(f"the task '{name}' has no {split} rows of its own: {what_to_do}")

    rows = {"train": [], "test": []}
    for split in splits:
        if is_grounding:
            rows[split] = grounding_rows(sources[split], thousandths=unit == "1000")
        else:
            rows[split] = load_rows(sources[split])
        if not rows[split]:
            raise ValueError(f"{sources[split]}: no rows in it; expected JSONL rows of {fields}")
    if not is_grounding:
        return Task(name, **rows, instruction=BOXED, percent=PERCENT.get(name, "value"))
    boxes = {"judge_function": judge_box, "answer_function": find_box, "is_grounding": True}
    return Task(name, **rows, **boxes, thousandths=unit == "1000")


def load_task_file(name, splits=("train", "test"), seed=0):
    """The task in a task file; name: its path, or the short name of a world."""
    file = file_of(name)
    module = load_file(file)
    if not hasattr(module, "load"):
        raise ValueError(f"the file {file} is no task: it has no function load(split, seed=0)")
    judge = getattr(module, "judge", None)

    rows = {"train": [], "test": []}
    for split in splits:
        where = f"load('{split}') of {file}"
        rows[split] = call(where, module.load, split, seed=seed)
        if not isinstance(rows[split], list) or not rows[split]:
            raise ValueError(f"{where} must return a list of rows, not {rows[split]!r:.80}")
        for number, row in enumerate(rows[split]):
            question = row.get("question") if isinstance(row, dict) else None
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"{where}: row {number} has no 'question' with text in it")
            if judge is None and row.get("answer") in (None, ""):
                raise ValueError(f"{where}: row {number} has no 'answer', and there is no judge()")
            row.setdefault("answer", "")

    return Task(
        name if name in WORLDS else file.stem,
        **rows,
        instruction=getattr(module, "INSTRUCTION", "" if judge else BOXED),
        styles=tuple(getattr(module, "DOMAINS", ())),
        judge_function=judge,
        answer_function=getattr(module, "answer", None),
        style_function=getattr(module, "style", None),
        percent=getattr(module, "PERCENT", "value"),
    )


TEXT_FIELDS, BOX_FIELDS = "{question, answer}", "{image, expression, bbox}"
FIELD_NAMES = {  # hub sets name the fields differently: the first present of
    "question": ("question", "problem", "prompt", "query"),
    "answer": ("final_answer", "answer"),
}


def load_rows(source):
    """Rows {question, answer} from a JSONL file or a hub set. ValueError naming file and line."""
    rows = []
    for where, raw in raw_rows(source, TEXT_FIELDS):
        raw = raw if isinstance(raw, dict) else {}
        row = {}
        for field, names in FIELD_NAMES.items():
            values = [raw[name] for name in names if isinstance(raw.get(name), str | int | float)]
            if not values or not str(values[0]).strip():
                raise ValueError(f"{where}: no '{field}' with text; every row needs {TEXT_FIELDS}")
            row[field] = str(values[0]).strip()
        row["answer"] = row["answer"].split("####")[-1].strip()  # GSM8K puts its work before that
        rows.append(row)
    return rows


def raw_rows(source, fields):
    """(where it stands, row) for each row of a JSONL file or of "hub:DATASET[:CONFIG[:SPLIT]]"."""
    if source.startswith("hub:"):
        import datasets  # late: a local run needs neither the package nor a network

        name, config, split = (source[4:].split(":") + ["", ""])[:3]
        rows = datasets.load_dataset(name, config or None, split=split or "train")
        if "image" in rows.column_names:  # the files, not their pixels
            rows = rows.cast_column("image", datasets.Image(decode=False))
        for number, row in enumerate(rows):
            yield f"{source}, row {number}", row
        return

    if not Path(source).is_file():
        raise ValueError(f"no such file: {source} (expected JSONL rows of {fields})")
    lines = Path(source).read_bytes().split(b"\n")  # splitlines would cut at U+2028 in a string
    for number, line in enumerate(lines, 1):
        where = f"{source}, line {number}"
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{where}: not JSON ({error}), one object a line") from None
            yield where, row


ASK_BOX = """Where in this picture is: {}?
Answer with its bounding box as a JSON list [x0, y0, x1, y1], in {}."""


def grounding_rows(source, thousandths=False):
    """Rows {question, answer, image, id} from a JSONL of {image, expression, bbox} or a hub set.

    image: a path, relative to the JSONL, or a data URI. bbox: [x0, y0, x1, y1] in pixels of the
    image as stored. The *question* states the unit of the answer: those pixels, or thousandths of
    width and height, as Qwen2-VL and Qwen3-VL learnt it. ValueError for images without that box.
    """
    rows = []
    for where, raw in boxes_of(source):
        for field in ("image", "expression", "bbox"):
            if not raw.get(field):
                raise ValueError(f"{where}: no '{field}' in it; every row needs {BOX_FIELDS}")
        width, height = image_size(raw["image"], where)
        box = raw["bbox"]
        try:
            x0, y0, x1, y1 = box
            is_inside = 0 <= x0 < x1 <= width + 1 and 0 <= y0 < y1 <= height + 1
        except (TypeError, ValueError):  # not four, or no numbers
            is_inside = False
        if not is_inside:
            wanted = "[x0, y0, x1, y1] with x0 < x1 and y0 < y1 inside the image"
            raise ValueError(f"{where}: the bbox {box} is no {wanted} of {width} x {height} pixels")

        unit = f"pixels (it is {width} wide and {height} high)"
        if thousandths:
            sides = (width, height, width, height)
            box = [round(1000 * x / side) for x, side in zip(box, sides)]
            unit = "thousandths of its width and height"
        question = ASK_BOX.format(str(raw["expression"]).strip(), unit)
        rows.append({"question": question, "answer": str(box), "image": raw["image"], "id": where})
    return rows


def boxes_of(source):
    """(where it stands, {image, expression, bbox}) for each box of a JSONL file or a hub set."""
    for where, row in raw_rows(source, BOX_FIELDS):
        row = row if isinstance(row, dict) else {}
        image = row.get("image")
        if source.startswith("hub:"):  # several expressions a row; a box is x, y, width, height
            x, y, width, height = row["bbox"]
            box = [x, y, x + width, y + height]
            for i, expression in enumerate(row["answer"]):
                row = {"image": image["bytes"], "expression": expression, "bbox": box}
                yield f"{where}.{i}", row
        else:
            if isinstance(image, str) and not image.startswith("data:"):
                row["image"] = str(Path(source).parent / image)
            yield where, row


def image_size(source, where):
    """(width, height) of an image, from its header: a path, a data URI, or a file's bytes."""
    from PIL import Image  # late: text tasks need no Pillow

    name = source[:80] if isinstance(source, str) else "(in memory)"
    try:
        if isinstance(source, str) and source.startswith("data:"):
            source = base64.b64decode(source.partition(",")[2], validate=True)
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # not only a warning
            with Image.open(source) as image:
                return image.size
    except FileNotFoundError:
        raise ValueError(f"{where}: no such image: {name}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        raise ValueError(f"{where}: the image {name} cannot be used ({error})") from None


# --------------------------------------------------------------------------------------------------
# 2. Prompts

PROMPT_STYLES = ("auto", "chat", "plain", "few-shot")
FEW_SHOT = r"""Question: A box holds 12 pens. How many pens are in 3 boxes?
Answer: Each box holds 12 pens, so 3 boxes hold 3 * 12 = 36 pens. The answer is \boxed{36}.

Question: Tom had 20 dollars and spent a quarter of it. How much is left?
Answer: A quarter of 20 is 5. 20 - 5 = 15. The answer is \boxed{15}.

"""
NEXT_QUESTION = "\nQuestion:"  # a base model goes on with a question of its own: it is cut there


def prompt_style(tokenizer, style):
    """The style that "auto" stands for: chat where the tokenizer has a template, or else plain."""
    if style != "auto":
        return style
    return "chat" if tokenizer.chat_template else "plain"


def stop_strings(tokenizer, style):
    """Strings that end a completion in this prompt style, beside the end tokens."""
    return () if prompt_style(tokenizer, style) == "chat" else (NEXT_QUESTION,)


def prompt_ids(question, tokenizer, instruction="", style="auto"):
    """Token ids of the prompt for one question.

    style: "chat" uses the tokenizer's chat template, "plain" is the question and "Answer:",
    "few-shot" puts two worked examples before that in place of the instruction (for base models).
    """
    style = prompt_style(tokenizer, style)
    if style == "chat":
        if not tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template: use --prompt plain or few-shot")
        messages = [{"role": "user", "content": question + instruction}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template wrote the special tokens itself.
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if style == "few-shot":
        return tokenizer(f"{FEW_SHOT}Question: {question}\nAnswer:")["input_ids"]
    return tokenizer(f"Question: {question}{instruction}\nAnswer:")["input_ids"]


# --------------------------------------------------------------------------------------------------
# 3. The verifier
# An answer is never run as code and never rounded. It is read in three steps. RULES, a table of
# patterns, remove decoration and ambiguity. Reader spells the rest as a Python expression, because
# TeX is none (\frac12, \sin^2 2x, |x|), and Python's own parser makes a tree of that. Evaluator
# walks the tree. Numbers are computed modulo a fixed 280-bit prime, where + - * / and powers keep
# their laws and nothing grows. Equal numbers have equal residues. Unequal ones differ: fractions of
# up to 40 digits for certain, all others but for odds below 1e-60 (Schwartz 1980).
#
# Of functions the residue knows little: sin x is a random number. Where residues differ and there
# are functions, roots or powers with letters, both sides are computed to 120 digits, at several
# random points if they have letters: they are equal if they agree at each to 80 digits, and all
# numbers on the way have fewer than 30 (so that nothing can be too small to be seen).
#
# What does not parse, is too large or has two readings is *undecided*, and never equal. A reader
# who wants the method only can go on with part 4.
#
# The rules of equality:
# - The same text, but for decoration, is the same answer, whatever it means.
# - Two readings are undecided: 10-15 (a range), \sqrt23, dy/dx, 3e-2, 1,05,000, u(x + 1), det(2A),
#   [x] (a floor), a or b, \vec a \times \vec b, and A B = B A, as matrices do not commute.
# - Nothing is rounded: 0.33 != 1/3. A percent is its value: 50% = 0.5, 50% != 50 (see `percent`).
# - A unit or a currency counts only where both answers have one: 5 = 5 cm, 5 cm != 5 m. Units are
#   those of UNITS, and plural nouns right after a number: 5 apples. Any other letter is a variable.
# - A name is what a value is said to be: x = v, x = y = v, f(x) = v and x in v equal a bare v. Two
#   names must agree. Several names with values equal a list of them, in alphabetical order.
# - A bare list equals a set, in any order; a tuple is ordered, its brackets count, it equals no
#   list. 1,234 is a number, (1,234) a pair, 1,23 a list. x > 3 is the interval (3, infinity).
# - Equations and inequalities are equal if one is a rational (and positive) multiple of the other.
# - f(2) is a value of f, and no product; so is P(x); n(n+1) is a product. 52_8 is not 52, nor 42.
# - (C) 12 equals C, and it equals 12. Words are compared without case, but CO and Co are symbols.

# Beyond any of these, or where reading it ends in an error, an answer is undecided.
MAX_CHARS, MAX_BRACKETS, MAX_EXPONENT, MAX_FACTORIAL = 500, 60, 10_000, 2100
MAX_FUNCTIONS, MAX_SPENT = 30, 120  # to be computed to many digits, in a comparison, in a verdict


def require(condition, why):
    """Raise the ValueError that makes an answer undecided, unless the condition holds."""
    if not condition:
        raise ValueError(why)


# ---- Values: numbers modulo PRIME, and shapes ----
# PRIME is -1 modulo 8 and modulo every odd prime below 200. By quadratic reciprocity all these
# primes are squares modulo PRIME, and -1 is none. The squares form a group of odd order PRIME // 2:
# each has exactly one n-th root there, and roots multiply as those of positive reals do:
# sqrt(2) sqrt(3) = sqrt(6), without any factorization.

SMALL_PRIMES = [n for n in range(3, 200, 2) if pow(2, n, n) == 2]  # Fermat's test, exact to 340
PRIME = 456 * math.prod(SMALL_PRIMES) - 1


@dataclass(frozen=True)
class Number:
    """real + imaginary i, both modulo PRIME."""

    real: int
    imaginary: int = 0
    tree: object = dataclasses.field(default=None, compare=False)  # how it came about, for digits()
    kind = "number"

    def __add__(self, other):
        real = (self.real + other.real) % PRIME
        imaginary = (self.imaginary + other.imaginary) % PRIME
        return Number(real, imaginary, ("+", self.tree, other.tree))

    def __sub__(self, other):
        real = (self.real - other.real) % PRIME
        imaginary = (self.imaginary - other.imaginary) % PRIME
        return Number(real, imaginary, ("-", self.tree, other.tree))

    def __mul__(self, other):
        real = self.real * other.real - self.imaginary * other.imaginary
        imaginary = self.real * other.imaginary + self.imaginary * other.real
        return Number(real % PRIME, imaginary % PRIME, ("*", self.tree, other.tree))

    def __truediv__(self, other):
        norm = other.real**2 + other.imaginary**2
        factor = pow(norm, -1, PRIME)  # a ValueError if other = 0
        inverse = Number(other.real * factor % PRIME, -other.imaginary * factor % PRIME)
        quotient = self * inverse
        return Number(quotient.real, quotient.imaginary, ("/", self.tree, other.tree))

    def fraction(self):
        """The fraction n/d, both below 2^64, with this residue, or None. There is at most one."""
        if isinstance(self.tree, Fraction):
            return self.tree
        before, remainder = PRIME, self.real  # Euclid finds it: all the way
        factor_before, factor = 0, 1  # remainder = factor * self.real modulo PRIME
        while remainder >= 1 << 64:
            quotient = before // remainder
            before, remainder = remainder, before - quotient * remainder
            factor_before, factor = factor, factor_before - quotient * factor
        if self.imaginary or abs(factor) >= 1 << 64:
            return None
        return Fraction(remainder, factor)


@dataclass(frozen=True)
class Shape:
    """Any other value: a tuple, a set, an interval, an equation, infinity, words, a matrix."""

    kind: str  # of kind "is" are values that something is said to be: x = 5, with its name
    items: object
    name: str = ""
    bound: object = dataclasses.field(default=None, compare=False)  # f(x) = v: v with # for x


def number(fraction):
    """The Number of a whole number or a Fraction."""
    if not isinstance(fraction, Fraction):
        fraction = Fraction(fraction)
    residue = fraction.numerator
    if fraction.denominator > 1:
        residue *= pow(fraction.denominator, -1, PRIME)
    return Number(residue % PRIME, 0, fraction)


ZERO, ONE, MINUS, IMAGINARY = number(0), number(1), number(-1), Number(0, 1, ("i",))
HALF, HUNDREDTH = number(Fraction(1, 2)), number(Fraction(1, 100))
INFINITY, MINUS_INFINITY = Shape("infinity", "infty_"), Shape("infinity", "minfty_")
INFINITIES = {INFINITY, MINUS_INFINITY}
REALS = Shape("()", (MINUS_INFINITY, INFINITY))


@lru_cache(maxsize=4096)
def random_residue(*name):
    return random.Random(str(name)).randrange(PRIME)


def symbol(name):
    """The random number that a letter or a unit stands for."""
    return Number(random_residue(name), 0, ("symbol", name))


def unknown(operation, *arguments):
    """The random number that a power or a function stands for where the residue cannot know it."""
    residues = [(argument.real, argument.imaginary) for argument in arguments]
    trees = [argument.tree for argument in arguments]
    return Number(random_residue(operation, *residues), 0, (operation, *trees))


def power(base, exponent):
    """base ** exponent: exact for a whole exponent or a rational base, otherwise unknown."""
    n = exponent.fraction()
    if n is None or (n.denominator > 1 and base.fraction() is None):
        return unknown("^", base, exponent)
    require(abs(n) <= MAX_EXPONENT and (base != ZERO or n > 0), "a huge power or 0 / 0")
    result = root(base, n.denominator) if n.denominator > 1 else base
    if result.imaginary == 0:
        result = Number(pow(result.real, n.numerator, PRIME))
    else:
        require(abs(n) <= 100, "a huge complex power")
        factor = result if n > 0 else ONE / result
        result = math.prod([factor] * abs(n.numerator), start=ONE)
    return Number(result.real, result.imaginary, ("^", base.tree, exponent.tree))


def root(x, degree):
    """The root of a rational x. Odd roots are real (the third root of -8 is -2), sqrt(-4) is 2i."""
    is_positive = x.fraction() >= 0
    require(is_positive or degree % 2 == 1 or degree == 2, "a complex root")
    sign, radicand = ONE, x.real
    if not is_positive:
        sign, radicand = IMAGINARY if degree == 2 else MINUS, -x.real % PRIME

    residue = root_residue(radicand, degree)
    if pow(residue, degree, PRIME) != radicand:
        # A prime factor above 200 may make the radicand no square; then minus it is one.
        residue = root_residue(-radicand, degree)
        sign = sign * symbol(f"root {degree} of -1")
    return sign * Number(residue)


@lru_cache(maxsize=4096)
def root_residue(radicand, degree):
    return pow(radicand, pow(degree, -1, PRIME // 2), PRIME)


@lru_cache(maxsize=256)
def factorial_residue(n):
    return math.factorial(n) % PRIME


@lru_cache(maxsize=256)
def binomial(n, k):
    return math.comb(n, k)


def call_function(name, arguments):
    """A function of numbers where we can expand it, else the random number of its value."""
    x, *others = arguments
    fraction = x.fraction()
    is_whole = fraction is not None and fraction.denominator == 1
    if name == "exp":
        return power(symbol("e_"), x)
    if name == "sqrt":
        return power(x, HALF)
    if name == "root":
        return power(x, ONE / others[0])
    if name == "log" and others:  # to a base
        return call_function("ln", [x]) / call_function("ln", others)
    if name == "abs" and fraction is not None:
        return number(abs(fraction))
    if name in ("floor", "ceil") and fraction is not None:
        return number(math.floor(fraction) if name == "floor" else math.ceil(fraction))
    if name == "factorial" and is_whole and 0 <= fraction <= MAX_FACTORIAL:
        return Number(factorial_residue(fraction.numerator), 0, ("factorial", fraction))
    if name == "binom":
        chosen = others[0].fraction()
        if is_whole and chosen is not None and 0 <= chosen <= fraction <= MAX_FACTORIAL:
            return number(binomial(fraction.numerator, chosen.numerator))
    require(len(others) == (name == "binom"), "a function of several values")
    return unknown(name, *arguments)


# ---- Digits: what residues cannot tell ----


class Spent(threading.local):
    """How many functions this thread has computed for its present verdict."""

    functions = 0


SPENT = Spent()
DIGITS = mpmath.MPContext()
DIGITS.dps = 120
CLOSE, LARGEST = DIGITS.mpf(10) ** -80, DIGITS.mpf(10) ** 30
SIGNS_OF_POINTS = ((1, 1), (-1, 1), (-1, -1), (1, -1))  # of the letters, in turn, at each point
BRANCHING = {"abs", "ln", "log", "arcsin", "arccos", "arctan"}  # may agree on one side of a point
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
WITH_DIGITS = {"abs": abs, "ln": DIGITS.ln, "arcsin": DIGITS.asin, "arccos": DIGITS.acos}
WITH_DIGITS |= {"arctan": DIGITS.atan, "sin": DIGITS.sin, "cos": DIGITS.cos, "tan": DIGITS.tan}
WITH_DIGITS |= {"sinh": DIGITS.sinh, "cosh": DIGITS.cosh, "tanh": DIGITS.tanh}
RECIPROCALS = {"cot": "tan", "sec": "cos", "csc": "sin"}


def is_rational(tree):
    """Whether a tree has only + - * / and whole powers: its residue tells all."""
    if not isinstance(tree, tuple) or tree[0] in ("symbol", "i"):
        return True
    operation, *operands = tree
    if operation == "^":
        return is_whole_number(operands[1]) and is_rational(operands[0])
    return operation in "+-*/" and all(map(is_rational, operands))


def is_whole_number(tree):
    """Whether a tree is a whole number, or minus one."""
    if isinstance(tree, tuple) and tree[0] == "*" and tree[1] == -1:
        tree = tree[2]
    return isinstance(tree, Fraction) and tree.denominator == 1


def leaves(tree, operation):
    """The operands of all nodes of one operation in a tree, each a tuple."""
    if not isinstance(tree, tuple):
        return set()
    found = {tree[1:]} if tree[0] == operation else set()
    if tree[0] != "symbol":
        for operand in tree[1:]:
            found |= leaves(operand, operation)
    return found


def count_functions(tree):
    """How many nodes of a tree take long to compute."""
    if not isinstance(tree, tuple) or tree[0] in ("symbol", "i"):
        return 0
    return (tree[0] not in "+-*/") + sum(map(count_functions, tree[1:]))


def is_branching(tree):
    """Whether a tree has a function, or a power of letters, that has several branches."""
    if not isinstance(tree, tuple) or tree[0] in ("symbol", "i"):
        return False
    if tree[0] == "^" and not is_whole_number(tree[2]) and letters_of(tree[1]):
        return True
    return tree[0] in BRANCHING or any(map(is_branching, tree[1:]))


def letters_of(tree):
    """The names of the letters in a tree."""
    return {name for (name,) in leaves(tree, "symbol")} - {"pi_", "e_"}


def largest_constant(tree):
    """The largest absolute value of the fractions in a tree."""
    if isinstance(tree, Fraction):
        return abs(tree)
    if tree[0] in ("symbol", "i"):
        return 0
    return max(map(largest_constant, [item for item in tree[1:] if not isinstance(item, str)]))


def same_digits(a, b):
    """Whether two trees have the same value: True, False, or None if that is not certain.

    Letters take random values near 1, of all signs. |x + 10| and x + 10 agree at these: where there
    are branches, values beyond all constants are tried, too.
    """
    count = count_functions(a) + count_functions(b)
    SPENT.functions += count
    require(count <= MAX_FUNCTIONS and SPENT.functions <= MAX_SPENT, "long computations")
    letters = letters_of(a) | letters_of(b)
    if not letters and not leaves(a, "?") and not leaves(b, "?"):
        return agree(a, b, {})
    scales = [dict.fromkeys(letters, 1)]
    if is_branching(a) or is_branching(b):
        large = 10 * max(10, largest_constant(a), largest_constant(b))
        bases = letters.copy()
        for _, exponent in leaves(a, "^") | leaves(b, "^"):  # these would make huge powers
            bases -= letters_of(exponent)
        scales.append(scales[0] | dict.fromkeys(bases, large))
    may_be_complex = bool(leaves(a, "abs") | leaves(b, "abs"))
    for scale_of in scales:
        agreed = 0
        for point in random_points(scale_of, may_be_complex):
            are_close = agree(a, b, point)
            if are_close is False:
                return None  # maybe equal where they are asked for: n whole, x positive
            agreed += are_close is True
        if agreed < 3:
            return None
    return True


def random_points(scale_of, may_be_complex):
    """{letter: value} of four points, which grow up to 8 times the scale_of each letter.

    may_be_complex: z and w are, as |z|^2 is z^2 of real numbers only. Other letters are real.
    """
    for k, signs in enumerate(SIGNS_OF_POINTS):
        point = {}
        for index, (name, scale) in enumerate(sorted(scale_of.items())):
            size = (1 + random_digits(f"{name} {k}")) * 2**k / 2
            point[name] = signs[index % 2] * size * scale.numerator / scale.denominator
            if may_be_complex and name in ("z_", "w_"):
                point[name] *= DIGITS.mpc(1, "0.3")
        yield point


def agree(a, b, point):
    """Whether two trees have the same value where letters have the values of a point.

    None where one is not defined or too large.
    """
    values = {"pi_": DIGITS.pi(), "e_": DIGITS.e(), **point}
    try:
        left, right = digits(a, values), digits(b, values)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        return None
    return bool(abs(left - right) <= CLOSE * max(1, abs(left), abs(right)))


def digits(tree, values):
    """The value of a tree to 120 digits, complex where it must be. ValueError if it is large."""
    if isinstance(tree, Fraction):
        value = DIGITS.mpf(tree.numerator) / tree.denominator
    elif tree[0] == "symbol":
        value = values[tree[1]]
    elif tree[0] == "i":
        value = DIGITS.mpc(0, 1)
    elif tree[0] == "?":  # of an unknown function: the same where its arguments are the same
        value = random_digits(tree[1], *[digits(argument, values) for argument in tree[2:]])
    else:
        operands = [digits(operand, values) for operand in tree[1:]]
        value = digits_of(tree[0], *operands)
        if tree[0] not in ("*", "/", "^") and abs(value) < CLOSE:  # sin(pi), or what cancels out
            value = DIGITS.mpf(0)
    size = abs(value)
    require(size == 0 or 1 / LARGEST < size < LARGEST, "a number too large or too small")
    return value


def digits_of(operation, x, *others):
    """The value of an operation or a function of numbers with many digits."""
    if operation in ARITHMETIC:
        return ARITHMETIC[operation](x, *others)
    if operation == "^":
        return digits_power(x, *others)
    if operation in WITH_DIGITS:
        return WITH_DIGITS[operation](x)
    if operation in RECIPROCALS:
        return 1 / WITH_DIGITS[RECIPROCALS[operation]](x)
    if operation == "log":  # to base 10 or e: it is not known which
        return DIGITS.ln(x) * random_digits("log")
    if operation == "factorial":
        return digits_factorial(x)
    require(operation == "binom", "a function without digits")
    k = others[0]
    return digits_factorial(x) / digits_factorial(k) / digits_factorial(x - k)


def random_digits(name, *arguments):
    """A random number in (0, 1), the same for the same name and (rounded) arguments."""
    rounded = [DIGITS.nstr(argument, 50) for argument in arguments]
    return DIGITS.mpf(random_residue(name, *rounded)) / PRIME


def digits_factorial(x):
    """x! where it is whole, and elsewhere any function of which x! = x (x - 1)! is true."""
    require(x.imag == 0 and abs(x) < 60, "a factorial of a large number")
    whole = int(DIGITS.floor(x + CLOSE))
    rest = x - whole
    value = DIGITS.mpf(1) if abs(rest) < CLOSE else random_digits("factorial", rest)
    for k in range(1, whole + 1):
        value *= rest + k
    for k in range(whole + 1, 1):
        value /= rest + k
    return value


def digits_power(base, exponent):
    """base ** exponent; odd roots of negative numbers are real, as in root()."""
    if base.imag == 0 and base.real < 0 and exponent.imag == 0:
        for degree in (3, 5, 7, 9):
            numerator = DIGITS.nint(exponent.real * degree)
            if numerator % degree and abs(exponent * degree - numerator) < CLOSE:
                sign = -1 if numerator % 2 else 1
                return sign * (-base.real) ** exponent.real
    return base**exponent


# ---- Rules: they remove decoration and ambiguity ----


def words(text):
    """["a", "b"] of the text "a b"."""
    return text.split()


def pairs(text):
    """{"a": "b", "c": "d"} of the text "a@b c@d"."""
    return dict(pair.split("@") for pair in text.split())


FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp"
FUNCTION_NAMES = set(FUNCTIONS.split("|"))
NAMES = words(
    "pi alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi "
    "rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega "
    "ell hbar infty"
)
COMMANDS = pairs(
    r"dfrac@\frac tfrac@\frac cfrac@\frac dbinom@\binom tbinom@\binom cdot@* times@* ast@* div@/ "
    r"le@<= leq@<= leqslant@<= ge@>= geq@>= geqslant@>= ne@!= neq@!= lt@< gt@> vert@| lvert@| "
    r"rvert@| mid@| lbrace@\{ rbrace@\} lbrack@[ rbrack@] "
    r"degree@^\circ prime@' colon@: "
    r"backslash@\setminus varnothing@\emptyset land@\wedge lor@\vee infin@\infty "
    r"asin@\arcsin acos@\arccos atan@\arctan lg@\log_{10} "
    "left@ right@ big@ Big@ bigl@ bigr@ Bigl@ Bigr@ bigg@ Bigg@ biggl@ biggr@ displaystyle@ "
    "textstyle@ boxed@ fbox@ mathbf@ boldsymbol@ mathit@ quad@ qquad@ limits@ middle@ "
    "operatorname@ enspace@ thinspace@"
)
SIGNS = pairs(
    r"−@- –@- ‐@- ×@* ·@* ⋅@* ∙@* ÷@/ ⁄@/ ≤@<= ⩽@<= ≥@>= ⩾@>= ≠@!= ½@\frac12 "
    r"⅓@\frac13 ¼@\frac14 π@\pi θ@\theta ∞@\infty √@\sqrt °@^\circ ∪@\cup ∩@\cap ±@\pm ∈@\in "
    r"∅@\emptyset ’@' ′@' “@ ”@ €@€ £@£ ≈@\approx ∧@\wedge ∨@\vee ℝ@\mathbb{R} ⟨@\langle ⟩@\rangle"
)
UNITS = pairs(
    "cm@centimeter km@kilometer mm@millimeter m@meter in@inch ft@foot feet@foot yd@yard mi@mile "
    "g@gram kg@kilogram mg@milligram lb@pound oz@ounce mL@milliliter ml@milliliter "
    "L@liter s@second sec@second min@minute h@hour hr@hour deg@degree N@newton J@joule W@watt "
    "V@volt A@ampere K@kelvin Hz@hertz Pa@pascal kN@kilonewton kJ@kilojoule kW@kilowatt "
    "kPa@kilopascal mol@mole usd@dollar inche@inch metre@meter litre@liter kilometre@kilometer "
    "centimetre@centimeter degreeC@celsius degreeF@fahrenheit"
)
UNIT_NAMES = set(UNITS.values()) | set(
    words(
        "day week month year unit dollar cent euro sterling yen rupee cup gallon acre hectare way "
        "people person men women children radian time pint quart item point"
    )
)
ANY_CASE = set(words("cm km kg ft feet yd lb oz usd inche"))  # KM is km; Mg and mg are two units
SYNONYMS = {"pound", "sterling"}  # 5 pounds may be £5
KNOWN_UNITS = UNITS.keys() | UNIT_NAMES
SHORT_UNITS = words("m s g L h N J W V")  # only right after a number: 5 m, but not 5m
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
COUNTED = (  # plurals that are numbers themselves: 3 tens, 5 halves, 2 sevenths, 4 pairs
    r"ones|twos|threes|fours|fives|sixes|sevens|eights|nines|tens|elevens|twelves|twenties|"
    r"\w*teens|\w*ties|dozens|scores|hundreds|thousands|\w*illions|halves|thirds|quarters|"
    r"(?!month)\w*ths|pairs|couples|doubles|triples|twins|tuples|powers|roots|cubes|times|plus|minus|"
    r"less|\w*less|modulus|\w*ss|\w*us|\w*is|percents?|percentages|lakhs|crores|halfs|grosses|"
    r"myriads|googols|permilles|permils|reciprocals|inverses|negatives|opposites|squares|grands|"
    r"factorials|duos|trios|dyads|triads|\w*tets|multiples|bips|dozenths|logs|logarithms"
)
SPELLED = words("zero one two three four five six seven eight nine ten eleven twelve")
BRACED = r"[^{}]*"
for _ in range(3):  # what braces hold, with up to three more pairs inside
    BRACED = rf"(?:\\.|[^{{}}\\]|\{{{BRACED}\}})*"


SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")


def superscript(match):
    return f"^{{{match[0].translate(SUPERSCRIPTS)}}}"


def ascii_sign(match):
    return f" {SIGNS.get(match[0], match[0])} "


def unescaped(match):
    return match[0].replace("\\\\", "\\")


def plain_command(match):
    return COMMANDS.get(match[1], match[0]) or " "


def matrix_call(match):
    rows = match[2].replace("&", ",").replace(r"\\", ",),(")
    return rf"\matrix(({rows},))"


def without_separators(match):
    return re.sub("[, ]", "", match[0])


def quoted_words(match):
    return re.sub("[A-Za-z]+", r' "\g<0>" ', f" {match[1]} ")


def mixed_number(match):
    whole, numerator, denominator = match.groups()
    is_proper = int(numerator) < int(denominator)  # 1 5/4 may be a product: undecided
    return f"{{{whole}+{numerator}/{denominator}}}" if is_proper else f"?{match[0]}"


def repeating_decimal(match):
    whole, digits, repeated = match.groups()
    return f"{{{whole}.{digits}0+{repeated}/{'9' * len(repeated)}{'0' * len(digits)}}}"


def mixed_fraction(match):
    whole, *digits = match.groups()
    numerator, denominator = [digit for digit in digits if digit]
    is_proper = int(numerator) < int(denominator)
    return f"{{{whole}+{numerator}/{denominator}}}" if is_proper else f"?{match[0]}"


def stacked(match):
    name = "binom" if "choose" in match[0] else "frac"
    return rf"\{name}{{{match[1]}}}{{{match[2]}}}"


def unclear(match):
    """The match behind a ?, which is no sign of answers: only the same text equals it."""
    text = match[0].replace(",", "?").replace("×", r"\times")
    return "?" + text.replace(r"\times", "?x")


def separators(match):
    """; as a comma, but where both separate items of one bracket, or it ends rows in [a; b; c]."""
    text = match[0]
    groups = []
    count = 1
    while count:  # the innermost brackets first
        groups += INNERMOST.findall(text)
        text, count = INNERMOST.subn("", text)
    for group in [*groups, text]:
        is_mixed = ";" in group and "," in group
        if is_mixed or (group.startswith("[") and group.count(";") > 1):
            return f"?{match[0]}"
    return match[0].replace(";", ",")


def spelled_number(match):
    return str(SPELLED.index(match[1].lower()))


INNERMOST = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")
RULES = []  # (pattern, replacement, before, after), applied in this order: many rely on others


def rule(pattern, replacement, before, after):
    """Add a rewriting rule. replacement: text with \\1 for a group, or a function of the match.

    before, after: an example of what it does, which a test checks.
    """
    RULES.append((re.compile(pattern), replacement, before, after))


WORD = r'"?(?<![\\A-Za-z])(?:{})(?![A-Za-z])"?'  # quoted or not
TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox|mathrm) ?\{([^{}]*)\}"
FRACTION = r"\\frac ?(?:\{(\d+)\} ?\{(\d+)\}|(\d)(\d)(?!\d))"
REPEATING = r"(\d*)\.(\d*)\\(?:overline|bar) ?\{(\d+)\}"
DEGREE = r'\^ ?(?:\{ ?\\circ ?\}|\\circ)(?: ?"?([CF])"?(?![A-Za-z]))?'
MATRIX = r"\\begin ?\{((?:p|b|small)?matrix|array)\}(.*?)(?:\\\\ ?)?\\end ?\{\1\}"
THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?![^(\[{]*(?:[)\]]|\\\}))"
SPACED_NUMBER = r"^-?\d{1,3}(?: \d{3})+(?:\.\d+)?(?=$| (?:\\text|[a-z]{2}))"
ZEROS_IN_LIST = r"(?<![\d,.])\d+(?:,\d+)*,0\d[\d,]*|^\$?0,\d+(?=\$?$)"
INDIAN = r"(?<![\d,.])\d{1,2}(?:,\d\d)+,\d{3}(?![\d,.])"
GERMAN = r"(?<![\d,.])\d{1,3}(?:\.\d{3})+,\d+(?![\d,.])"
MINUTES = r"(\d+) \"degree\" ?(\d+) ?'$"
BOLD = r"\\(?:mathbf|boldsymbol|bm|vec|hat) ?(?:\{ ?[A-Za-z] ?\}|[A-Za-z](?![A-Za-z]))"
BOLD_PRODUCT = rf"^(?=.*{BOLD}.*{BOLD})(?=.*(?:\\times|\\cdot|[*×·⋅)^]|{BOLD} ?{BOLD})).*"
AMOUNT = r'\d+(?:\.\d+)?(?: ?"dollar" ?|%| ?"degree" ?)?'
RANGE = (  # alone, or an item: behind the start, a comma or a sign of equality
    rf"(?:^[({{ ]*|(?<=[,=] )|(?<=[,=])){AMOUNT}(?:-{AMOUNT})+"
    rf'(?=[)}} ]*$|,| ?"| ?(?!{FUNCTIONS}|pi|sqrt)(?:[cmk]m|kg|[a-z]{{3}})| m$)'
)
LETTER_D = r'(?:d|"d"|\\partial) ?'
DERIVED = r"(?<![A-Za-z])[A-Za-z] ?\^ ?\{ ?\( ?[A-Za-z\d] ?\) ?\}(?! ?[(\[{])"
DERIVATIVE = (
    rf"\\frac ?\{{ ?{LETTER_D}[^{{}}]*(?:\{{[^{{}}]*\}}[^{{}}]*)*\}} ?"
    rf"\{{ ?{LETTER_D}[A-Za-z\\]"
)
QUOTIENT_OF_D = (
    rf"(?<![A-Za-z\\]){LETTER_D}(?:\^ ?\{{?\d\}}? ?)?[A-Za-z]?(?:\([a-z]\))? ?/ ?{LETTER_D}[A-Za-z]"
)
# fmt: off
rule(r"^(?:\$([^$]*)\$|\\\(((?:(?!\\\)).)*)\\\))$", r"\1\2", r"\(5\)", "5")
# Two readings: a ? makes an answer undecided, but for its own text.
# \sqrt23 is 3 sqrt(2) to TeX, and mostly not to its author; √23 is clear
rule(r"\\sqrt ?(?:\[\d\] ?)?(?=\d\d)", unclear, r"\sqrt23", r"?\sqrt23")
rule(r"√ ?(\d+)", r"\\sqrt{\1}", "√23", r"\sqrt{23}")
rule(r"(?<![\d/])\d+/\d+/\d+", unclear, "1/2/2020", "?1/2/2020")
# 2e-1 is 0.2 or 2e minus 1; 1e-3, 1.5e-3, 2E-1 and 2e-05 are clear
rule(r"(?<![\d.])(?!1e)\d+e[-+][1-9]\d?(?![\d.])", unclear, "2e-1", "?2e-1")
rule(r"^\$?(?:~|\\sim) ?(?=[\d\\])", unclear, "~5", "?~5")
# products of vectors and matrices, which are bold, do not commute
rule(BOLD_PRODUCT, unclear, r"\vec a \times \vec b", r"?\vec a ?x \vec b")
# as sympy writes ln
rule(r"\\log ?(?=\{ ?\\left ?\()", r"\\ln ", r"\log{\left(2)}", r"\ln {\left(2)}")
# Decoration
rule(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+", superscript, "10²³", "10^{23}")
rule(r"(?<=\d)[‐–](?=\d)", "-", "10–15", "10-15")
rule(r"[^\x00-\x7f]", ascii_sign, "3×4", "3 * 4")
rule(r"^(?!.*\\begin).*\\\\[A-Za-z].*$", unescaped, r"\\frac{1}{2}", r"\frac{1}{2}")
rule(r"\\operatorname\*? ?\{ ?([A-Za-z]+) ?\}", r"\\\1 ", r"\operatorname{atan}", r"\atan")
rule(r"\\([A-Za-z]+)\*?", plain_command, r"\dfrac{1}{2}", r"\frac{1}{2}")
rule(r"\{(array)\} ?\{[lcr| ]*\}", r"{\1}", r"\begin{array}{cc}", r"\begin{array}")
rule(MATRIX, matrix_call, r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\matrix((1,2,),(3,4,))")
rule(r"(?<=\d)(?:,\\!|\{ ?, ?\}|\\[, ]) ?(?=\d{3}(?!\d))", "", "1{,}234", "1234")
rule(r"(?<!\\)\\[,;:!> ]|~", " ", r"3\,x", "3 x")
rule(r"\\[()]|^\\\[|\\\]$|^\*\*|\*\*$|`", " ", r"\(5\)", "5")
rule(r"\*\*", "^", "2**3", "2^3")
rule(r"\\%", "%", r"50\%", "50%")
rule(SPACED_NUMBER, without_separators, "1 234 km", "1234 km")
# not in brackets, where commas separate
rule(THOUSANDS, without_separators, "1,234", "1234")
# 1,05,000, 0,5 and 1.234,56: numbers to some readers, lists to others
rule(rf"{ZEROS_IN_LIST}|{INDIAN}|{GERMAN}", unclear, "1,05,000", "?1?05?000")
rule(r"^US(?=\\?\$)|^USD(?= ?\d)", r"\\$", "USD 18", r"\$ 18")
rule(r"^\\\$ ?(?=\\?\$)", "", r"\$\$18", r"\$18")
rule(r"(?:\\\$|^\$(?=[^$]*$)) ?(-?\d[\d,]*(?:\.\d+)?)", r'\1 "dollar" ', r"\$5", '5 "dollar"')
rule(r"^([€£]) ?(\d[\d,]*(?:\.\d+)?)", r"\2 \1", "€5", "5 €")
rule("€", ' "euro" ', "5 €", '5 "euro"')
rule("£", ' "sterling" ', "5 £", '5 "sterling"')
rule(r"\\\$", ' "dollar" ', r"5\$", '5 "dollar"')
rule(r"\$", " ", "$5$", "5")
rule(r"^=|(?<!\.)[.,]$", "", "=5.", "5")
rule(TEXT, quoted_words, r"5 \text{ cm}", '5 "cm"')
rule(DEGREE, r' "degree\1" ', r"30^\circ", '30 "degree"')
# ranges, scores, dates and phone numbers: 10-15 is a difference only with spaces, or in a formula
rule(RANGE, unclear, "10-15", "?10-15")
rule(r"\\mathbb ?(?:\{ ?R ?\}|R)", r"\\reals ", r"\mathbb{R}", r"\reals")
rule(r"\{([^{}]*)\\(?:over|choose)(?![a-z])([^{}]*)\}", stacked, r"{1 \over 2}", r"\frac{1 }{ 2}")
# derivatives are no fractions of products
rule(DERIVATIVE, unclear, r"\frac{dy}{dx}", r"?\frac{dy}{dx}")
rule(QUOTIENT_OF_D, unclear, "dy/dx", "?dy/dx")
rule(DERIVED, unclear, "f^{(n)}", "?f^{(n)}")
rule(rf"(?<![\d.^_A-Za-z])(\d+) ?{FRACTION}(?! ?\^)", mixed_fraction, r"1\frac{4}{5}", "{1+4/5}")
rule(r"(?<![\d.^_A-Za-z/])(\d+) (\d+)/(\d+)(?! ?[\^\d])", mixed_number, "1 4/5", "{1+4/5}")
rule(REPEATING, repeating_decimal, r"0.1\overline{6}", "{0.10+6/90}")
rule(WORD.format("inf|infinity"), r"\\infty ", "(0,inf)", r"(0,\infty )")
rule(r"(?<=\d) ?x ?(?=10 ?\^)", "*", "2 x 10^3", "2*10^3")
rule(rf"(?<=[\d $}}]){WORD.format('percents?|pct')}", "%", "50 percent", "50 %")
rule(WORD.format("mph"), "mi/h", "20 mph", "20 mi/h")
rule(WORD.format("per"), "/", "5 m per s", "5 m / s")
rule(WORD.format("square|sq") + ' ("?[a-z]+"?)', r"\1^2", "5 square cm", "5 cm^2")
rule(WORD.format("cubic") + ' ("?[a-z]+"?)', r"\1^3", "5 cubic cm", "5 cm^3")
rule(r"^.*;.*$", separators, "(1; 2)", "(1, 2)")
rule(f", ?{WORD.format('and|or')}", ",", "1, 2, and 3", "1, 2, 3")
rule(f"{WORD.format('and')}|&", r"\\and ", '2 "and" 3', r"2 \and 3")
rule(WORD.format("or"), r"\\or ", "2 or 3", r"2 \or 3")
rule(WORD.format(f"({FUNCTIONS}|pi|sqrt)"), r"\\\1 ", "2sin(x)", r"2\sin (x)")
rule(r"([_^]) ?\{ ?([A-Za-z0-9]) ?\}", r"\1\2 ", "x_{1}", "x_1")
rule(rf"^\{{({BRACED})\}}$", r"\1", "{1,2}", "1,2")
rule(r"^([A-Za-z]\w?|[A-Z]+) ?\\approx", r"\1 =", r"x \approx 3.1", "x = 3.1")
rule(r" ?\\approx ?-?\d*\.\d+$", "", r"\sqrt{2} \approx 1.41", r"\sqrt{2}")
rule(MINUTES, r'{\1+\2/60} "degree"', "60 \"degree\" 42'", '{60+42/60} "degree"')
rule(rf'(?i)^"?({"|".join(SPELLED)})"?$', spelled_number, "two", "2")
rule(r"(?i)^(?:option|choice) (?=\(?[A-J]\)?$)", "", "Option C", "C")
rule(r"^([A-J])[.)] (?=[\d\\-])", r"(\1) ", "C. 12", "(C) 12")
rule(r'^[({]* ?"?([A-J])"? ?[)}.:]*$', r"\1", "(C)", "C")
# fmt: on


def tidy(answer):
    """An answer with all rules applied. Single spaces: no pattern can be made to backtrack long."""
    text = " ".join(answer.split())
    for pattern, replacement, _, _ in RULES:
        if pattern.search(text):
            text = " ".join(pattern.sub(replacement, text).split())
    return text


# ---- Reader: it spells a tidy answer as a Python expression ----

TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?)|"
    r'(?P<word>"[A-Za-z]+")|(?P<letters>[A-Za-z]+)|(?P<command>\\(?:[A-Za-z]+|[{}|]))|'
    r"(?P<sign><=|>=|!=|[-+*/^_=<>,!%()\[\]{}|':])|(?P<other>\S)"
)
END = ""  # the token after the last
BINARY = pairs(
    r"+@+ -@- *@* /@/ =@== <@< >@> <=@<= >=@>= !=@!= ,@, \in@in \cup@| \and@and \or@or \pm@+ "
    r"\mp@- \setminus@- \wedge@and \vee@or"
)
BRACKETS = {"()": "({})", "[]": "[{}]", "(]": "leftopen({})", "[)": "rightopen({})"}
BRACKETS |= {"][": "({})", "]]": "leftopen({})", "[[": "rightopen({})"}  # as the French write them
# f(x + 1) is a value of f, u(x + 1) may be one, a(x + 1) is a product.
APPLIED = set("fghFGHPQRTC") | {"phi", "varphi", "psi", "sigma", "tau", "Gamma", "zeta", "mu"}
MAY_BE_APPLIED = set("pquvyBDEJLMNOSUVWXYZ") | set(
    words("omega eta delta chi xi rho Omega Theta Lambda Xi Psi Phi Pi Sigma Delta")
)
NEVER_APPLIED = {"pi", "e", "i"}
OPENINGS = ("(", "[", "{")
SPELLED_FUNCTION = re.compile(f"(?:{FUNCTIONS}|sqrt)(?=.)|.(?:ln|log|sin|cos|tan|exp|sqrt)")
DECORATED = words("overline vec bar hat widehat tilde dot angle triangle underline overrightarrow")


@dataclass
class Token:
    text: str
    kind: str  # number, word (it was quoted), letters, command, sign
    is_spaced: bool  # whether a space stands before it


def split_tokens(text):
    """The tokens of a tidy answer. Short runs of letters that are no units are split: xy is x y."""
    tokens = []
    end = 0
    for match in TOKEN.finditer(text):
        word, kind = match[0], match.lastgroup
        require(kind != "other", "a sign that no answer has")
        is_spaced = match.start() > end
        end = match.end()
        if kind == "letters" and len(word) > 1 and is_product(word):
            require(not SPELLED_FUNCTION.search(word), "lnx, which may be ln x")
            is_before_bracket = text[end : end + 2].strip()[:1] in ("(", "[", "{")
            is_clear = not is_before_bracket or is_product_before_bracket(word)
            require(is_clear, "letters before a bracket that may be the name of a function")
            tokens.append(Token(word[0], kind, is_spaced))
            tokens += [Token(letter, kind, False) for letter in word[1:]]
        else:
            tokens.append(Token(word.strip('"'), kind, is_spaced))
    return tokens


def is_product(word):
    """Whether a run of letters is a product of them: xy is, but not cm, AB, Bob or apples."""
    if word in KNOWN_UNITS or word.isupper() or (word.istitle() and len(word) > 2):
        return False
    return len(word) <= 3 or not re.search("[aeiou]", word)


def is_product_before_bracket(word):
    """Whether the letters of ab(c + d) are a product for certain, and those of det(A), Re(z) not.

    Those of a product ascend, and names of functions have vowels: abc, kx, mn.
    """
    return word != "abs" and re.fullmatch("[a-z][^eiou]*", word) and list(word) == sorted(word)


class Reader:
    """Spells a tidy answer as Python: 2x as c0*x_, \\frac12 as ((c0)/(c1)), 5 m as c0*u0_meter.

    c0, c1, ... are its `constants`. ValueError for what has no reading, or more than one.
    """

    def __init__(self, text, minus=False, short_units=True):
        """minus: read \\pm as a minus. short_units: read the m of 5 m as a unit."""
        if minus:
            text = text.replace(r"\pm", "-").replace(r"\mp", "+")
        has_logic = r"\wedge" in text or r"\vee" in text
        require(not has_logic or re.search("[<>=]", text), "logic of letters")
        self.tokens = split_tokens(text)
        self.tokens.append(Token(END, "end", False))
        self.position = 0
        self.constants = []
        self.short_units = short_units
        self.is_power = False  # whether the last factor ends with an exponent
        self.in_function = 0  # how many functions the next token is an argument of
        openings = [token for token in self.tokens if token.text in ("(", "[", "{", r"\{")]
        require(len(openings) <= MAX_BRACKETS, "too many brackets")

    @property
    def next(self):
        """The next token's text."""
        return self.tokens[self.position].text

    def take(self):
        """The next token, which is read by this."""
        token = self.tokens[self.position]
        require(token.kind != "end", "an end too early")
        self.position += 1
        return token

    def expect(self, text):
        require(self.take().text == text, f"no {text} where one must be")

    def is_at_end(self):
        """Whether a unit may end here: with a square or a cube, and with a unit that divides it."""
        following = self.position
        if self.next == "^" and self.tokens[following + 1].text in ("2", "3"):
            following += 2
        token = self.tokens[following]
        if token.text == "/":
            divisor = self.tokens[following + 1]
            is_noun = len(divisor.text) > 3 or divisor.kind == "word"
            return divisor.text in KNOWN_UNITS or (divisor.text.isalpha() and is_noun)
        return token.text in (END, ",", ")", "]", "}", r"\}", r"\and", r"\or", r"\cup")

    def constant(self, value):
        self.constants.append(Fraction(int(value) if str(value).isdigit() else value))
        return f"c{len(self.constants) - 1}"

    def sequence(self, *closers):
        """Python for all tokens up to one of the closers, which is left to be read."""
        words = []
        is_factor = False  # whether the last word is a factor, which another one may follow
        while not (self.next in closers and (is_factor or self.next not in "|[")):
            token = self.take()
            if token.text in BINARY and token.kind != "letters":
                words.append(BINARY[token.text])
                is_factor = False
            elif is_factor and token.text in ("^", "!", "%"):
                words[-1] = self.postfix(words[-1], token)
            else:
                factor = self.factor(token, words, is_factor)
                self.is_power = False
                if is_factor:
                    self.require_product(words, factor, token)
                    words.append("*")
                words.append(factor)
                is_factor = True
                is_name = token.text == "{" and re.fullmatch(r"\([A-Za-z][A-Za-z_* ]*\)", factor)
                require(not is_name or self.next not in ("(", "["), "{f}(0), or {x}(x + 1)")
        return " ".join(words)

    def require_product(self, words, factor, token):
        """Whether factors side by side are a product for certain: 2x is, 2 3 and 1/2x are not."""
        are_numbers = factor[0] == "c" and is_constant(factor) and is_constant(words[-1])
        require(not are_numbers, "numbers in a row")
        if token.kind == "number":  # (x + 1) 2, but neither x2 nor x 2
            require(token.is_spaced and words[-1][-1] == ")", "a number behind a letter")
        are_functions = token.text == "(" and re.fullmatch(r"\([fgh]_ [-+*] [fgh]_\)", words[-1])
        require(not are_functions, "a sum or a product of functions, of something")
        are_words = is_word(factor) or is_word(words[-1])
        require(not are_words, "a word in a product")
        if words[-2:-1] == ["/"]:
            is_number = is_constant(words[-1]) and is_constant(words[-3])
            is_clear = factor.startswith("u0_") or (is_number and token.is_spaced)
            require(is_clear, "a product in a denominator, or after it")

    def postfix(self, word, token):
        """Python for a factor with an exponent, a factorial or a percent behind it."""
        if token.text == "^":
            power = f"{word}**{self.exponent()}"
            self.is_power = True
            return power
        require(not self.is_power, "a factorial of a power, or of its exponent")
        if token.text == "!":
            require(self.next != "!", "a double factorial")
            return f"factorial({word})"
        return f"percent({word})"

    def exponent(self):
        """Python for what stands behind ^: a group, a bracket, or a factor with a sign."""
        sign = "-" if self.next == "-" else ""
        if sign:
            self.take()
        return f"({sign}{self.argument()})"

    def argument(self, one_digit=False):
        """Python for one argument of a command: a group in braces, or else a single factor."""
        token = self.take()
        if one_digit and token.kind == "number" and len(token.text) > 1:
            require(re.fullmatch("[0-9]{2}", token.text), "digits that may be one or two arguments")
            self.position -= 1
            self.tokens[self.position] = Token(token.text[1], "number", False)
            return self.constant(token.text[0])
        return self.factor(token, [], False)

    def factor(self, token, words, is_factor):
        """Python for one factor that begins with a token; words: what stands before it."""
        if token.kind == "number":
            return self.number(token)
        if token.kind in ("word", "letters") and is_unit(token, words, is_factor, self):
            return self.unit(token)
        if token.text.lower() in SCALES and is_factor and is_constant(words[-1]):
            return f"({self.constant(SCALES[token.text.lower()])})"
        if token.kind in ("word", "letters"):
            return self.letter(token)
        if token.kind == "command" and token.text not in (r"\{", r"\}", r"\|"):
            return self.command(token)
        if token.text == "{":
            inner = self.sequence("}")
            self.expect("}")
            return inner if is_constant(inner) else f"({inner})"
        if token.text == r"\{":
            return self.braces()
        if token.text == "|":
            inner = self.sequence("|")
            self.expect("|")
            return f"abs({inner})"
        require(token.text in ("(", "[", "]"), "a sign that begins nothing")
        return self.bracket(token.text)

    def bracket(self, opening):
        """Python for what stands in brackets: a value, a tuple or an interval."""
        if opening == "]":
            inner = self.sequence("[", "]")
        else:
            inner = self.sequence(")", "]")
        kind = opening + self.take().text
        require(kind in BRACKETS, "brackets that do not match")
        return BRACKETS[kind].format(inner)

    def braces(self):
        """Python for a set: its elements, or a variable and a condition."""
        inner = self.sequence(r"\}", "|", ":")
        if self.take().text == r"\}":
            return f"{{{inner}}}" if inner else "emptyset_"
        condition = self.sequence(r"\}")
        self.expect(r"\}")
        return f"such(({inner}), ({condition}))"

    def number(self, token):
        """Python for a number; with an index behind it, digits in that base, it is unknown."""
        if self.next != "_":
            return self.constant(token.text)
        self.take()
        base = self.raw_argument()
        is_base = token.text.isdigit() and re.fullmatch("[0-9]+", base)
        require(is_base, "an index of a number that is no base")
        return f"digits_{token.text}_base_{base}_"

    def raw_argument(self):
        """The tokens of one argument, as they stand, in one word."""
        depth, text = 0, ""
        while not text or depth > 0:
            token = self.take().text
            depth += (token == "{") - (token == "}")
            text += token if token != " " else ""
        return text.strip("{}")

    def coded_argument(self):
        """The tokens of one argument as a part of a name, which keeps every sign."""
        return re.sub(r"\W", lambda match: f"o{ord(match[0])}", self.raw_argument())

    def unit(self, token):
        """Python for a unit. Degrees in a function are an angle."""
        name = unit_name(token.text)
        if name == "degree" and self.in_function:
            return f"(pi_/{self.constant(180)})"
        return f"u0_{name}"  # no letter has a digit there

    def letter(self, token):
        """Python for a letter or a word, with its index, or for the value of a function f(...)."""
        name = token.text
        is_unknown = token.kind == "word" and len(name) > 1 and self.next in OPENINGS
        require(not is_unknown, "a function that is not known")
        while self.next == "'":
            name += "prime"
            self.take()
        if self.next == "_":
            self.take()
            name += "_" + self.coded_argument()
        return self.applied(name)

    def applied(self, name):
        """Python for a name, which a bracket of any kind behind it may make a function."""
        if name in APPLIED and self.next == "^":  # f^{-1}(x): a function of that name
            start = self.position
            self.take()
            exponent = self.coded_argument()
            if self.next in OPENINGS:
                name += f"_to_{exponent}"
            else:
                self.position = start
        is_called = self.next in ("(", "[") or self.is_call_in_braces()
        if not is_called or name in NEVER_APPLIED:
            return f"{name}_"

        start = self.position
        opening = self.take().text
        inner = self.sequence(")", "]", "}")
        is_simple = re.fullmatch(r"\w+|.*,.*", inner) is not None
        is_function = name in APPLIED or name.startswith(tuple("fgh")) or name.isupper()
        if is_function or is_simple or "prime" in name or (opening == "[" and name == "E"):
            require(opening + self.take().text in ("()", "[]", "{}"), "brackets that do not match")
            return f"{name}_({inner})"
        require(opening == "(", "a letter before a bracket of another kind")
        is_factored = f"{name}_" in inner  # u(u + 1) is a product
        may_be_applied = name.partition("_")[0] in MAY_BE_APPLIED
        require(is_factored or not may_be_applied, "a product or a value of a function")
        self.position = start
        return f"{name}_"

    def is_call_in_braces(self):
        """Whether {(...)} comes next, as sympy writes what a function is applied to."""
        return self.next == "{" and self.tokens[self.position + 1].text in ("(", "[")

    def command(self, token):
        """Python for a command with its arguments."""
        name = token.text[1:]
        if name in FUNCTION_NAMES:
            return self.function(name)
        if name in NAMES:
            return self.letter(Token(name, "letters", False)) if name != "infty" else "infty_"
        if name == "frac":
            return f"(({self.argument(one_digit=True)})/({self.argument(one_digit=True)}))"
        if name == "binom":
            return f"binom({self.argument(one_digit=True)}, {self.argument(one_digit=True)})"
        if name == "sqrt":
            return self.root()
        if name == "matrix":
            self.expect("(")
            return f"matrix{self.bracket('(')}"
        if name in ("lfloor", "lceil"):
            inner = self.sequence(rf"\r{name[1:]}")
            self.take()
            return f"{name[1:]}({inner})"
        if name == "langle":
            inner = self.sequence(r"\rangle")
            self.take()
            return f"vector({inner})"
        if name in DECORATED:
            return self.decorated(name)
        require(name in ("reals", "emptyset"), "a command that no answer has")
        return f"{name}_"

    def decorated(self, name):
        """Python for a letter, or several, with a sign above or before them."""
        name += f"_{self.coded_argument()}"
        if name.startswith(("angle", "triangle")):  # \\angle A B C
            while self.tokens[self.position].kind == "letters":
                name += self.take().text
        require(self.next not in ("(", "[", "{"), "a decorated letter, of something")
        return f"{name}_"

    def root(self):
        """Python for a root, of any degree."""
        if self.next != "[":
            return f"sqrt({self.argument()})"
        self.take()
        degree = self.sequence("]")
        self.expect("]")
        return f"root({self.argument()}, {degree})"

    def function(self, name):
        """Python for a function: with an exponent or a base, and its argument in brackets or bare.

        An exponent between them is one of the value, -1 means the inverse. One behind the brackets
        is left to be read: sin(x)^2 is (sin x)^2.
        """
        exponent, base = "", ""
        while self.next in ("^", "_"):
            if self.take().text == "^":
                exponent = self.exponent()
            else:
                require(name == "log" and not base, "an index of a function, or two")
                base = f", {self.argument()}"
        if "-" in exponent:
            is_inverse = re.fullmatch(r"\(+- ?c[0-9]+\)+", exponent) and self.constants[-1] == 1
            require(is_inverse and f"arc{name}" in FUNCTION_NAMES, "an inverse, or a power")
            name, exponent = f"arc{name}", ""

        self.in_function += 1
        if self.next in ("(", "{", "["):
            argument = self.argument()
        else:
            argument = self.bare_argument()
        self.in_function -= 1
        call = f"{name}({argument}{base})"
        return f"({call}**{exponent})" if exponent else call

    def bare_argument(self):
        """Python for the argument of a function without brackets: the factors up to a sign."""
        words = []
        sign = "-" if self.next == "-" else ""
        if sign:
            self.take()
        while self.is_bare_factor():
            token = self.take()
            if words and token.text in ("^", "!"):
                words[-1] = self.postfix(words[-1], token)
            else:
                factor = self.factor(token, words, bool(words))
                self.is_power = False
                if words:
                    self.require_product(words, factor, token)
                words.append(factor)
        is_clear = self.next not in ("(", "[", "/", "{", "|", "%")
        require(words and is_clear, "a function of an argument whose end is not certain")
        return sign + "*".join(words)

    def is_bare_factor(self):
        """Whether the next token goes on with a bare argument of a function."""
        token = self.tokens[self.position]
        if token.kind == "command":
            return token.text[1:] in ("frac", "sqrt", "binom", *NAMES)
        is_degree = token.text == "degree"
        return token.kind in ("number", "letters") or token.text in ("^", "!") or is_degree


def is_constant(word):
    """Whether a word of Python is a plain number."""
    name = word.strip("()")
    return name[:1] == "c" and name[1:].isdigit()


def is_word(python):
    """Whether a word of Python is one of English: apples_, but not x_, AB_, pi_ or x_max_."""
    is_name = re.fullmatch("[A-Za-z]{2,}_", python) is not None
    return is_name and not python.isupper() and python[:-1] not in NAMES


def unit_name(word):
    """The name of a unit: cm, centimeters -> centimeter; of a counted noun itself, in singular."""
    if word in UNITS:
        return UNITS[word]
    name = word.lower()
    if len(name) > 3 and name.endswith("s"):
        name = name[:-1]
    is_clear = name in ANY_CASE or len(name) > 3 or word.islower()
    return UNITS.get(name, name) if is_clear else word


def is_unit(token, words, is_factor, reader):
    """Whether a word is a unit: a known one, or a plural noun, behind a value and before an end."""
    word = token.text
    is_behind_unit = len(words) > 1 and words[-1] == "/" and words[-2].startswith("u0_")
    if unit_name(word) == "degree" and is_factor:
        return True
    is_at_end = reader.is_at_end() and not reader.in_function
    if not is_at_end or not (is_factor or is_behind_unit):
        return False
    if len(word) == 1 and token.kind != "word" and not is_behind_unit:
        is_apart = token.is_spaced and is_constant(words[-1]) and reader.next != "}"
        return reader.short_units and word in SHORT_UNITS and is_apart
    if unit_name(word) in UNIT_NAMES:
        return True
    is_noun = len(word) > 3 and word.endswith("s") and not re.fullmatch(COUNTED, word.lower())
    return is_noun and (is_behind_unit or is_constant(words[-1]))


# ---- Evaluation ----

SUMS = (ast.Add, ast.Sub)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATIONS |= {ast.Div: operator.truediv, ast.Pow: power}
CONSTANTS = {"i_": IMAGINARY, "infty_": INFINITY, "minfty_": MINUS_INFINITY, "reals_": REALS}
CONSTANTS |= {"emptyset_": Shape("set", frozenset())}
CALLED = FUNCTION_NAMES | {"abs", "sqrt", "root", "factorial", "binom", "floor", "ceil"}
INTERVALS = {"Lt Lt": "()", "LtE LtE": "[]", "Lt LtE": "leftopen", "LtE Lt": "rightopen"}


@dataclass
class Evaluator:
    """Walks a tree of Python's syntax."""

    constants: list  # the values of c0, c1, ...
    units: bool = True  # otherwise each unit is 1
    percent: str = "value"  # 50% is 0.5; "sign": it is 50
    bound: str = ""  # the name of a letter that is called # instead
    variable: str = ""  # in a condition: the only letter that it is about

    def value(self, node):
        """The value of a node: a Number or a Shape."""
        match node:
            case ast.Name(name):
                return self.name(name)
            case ast.UnaryOp(operation, operand):
                return self.signed(operation, self.value(operand))
            case ast.BinOp(left, operation, right):
                return self.operation(left, operation, right)
            case ast.Call(ast.Name(name), arguments, []):
                return self.called(name, arguments)
            case ast.List([item]):
                return bracketed(self.value(item))
            case ast.List([_, _] as items):
                return Shape("[]", self.values(items))
            case ast.List(items) | ast.Tuple(items):
                return Shape("()", self.values(items))
            case ast.Set(items):
                return Shape("set", frozenset(self.values(items)))
            case ast.Compare():
                return self.relation(node)
            case ast.BoolOp(operation, items):
                return joined(operation, self.values(items))
        raise ValueError("a construct that no answer has")

    def values(self, nodes):
        return tuple(self.value(node) for node in nodes)

    def name(self, name):
        """The value of a constant, a letter or a unit."""
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name.startswith("u0_"):
            return symbol(name) if self.units else ONE
        if name[0] == "c" and name[1:].isdigit():
            return number(self.constants[int(name[1:])])
        require(name.endswith("_"), "a function of nothing")
        if is_word(name):
            return Shape("text", name[:-1].lower())
        return symbol("#" if name == self.bound else name)

    def signed(self, operation, operand):
        """+ or - of a value."""
        if isinstance(operation, ast.UAdd):
            return operand
        require(isinstance(operation, ast.USub), "a construct that no answer has")
        if operand == INFINITY:
            return MINUS_INFINITY
        return times(MINUS, operand)

    def operation(self, left, operation, right):
        """The value of two operands and what joins them."""
        if isinstance(operation, SUMS) and not self.units:
            require(not has_units(left) and not has_units(right), "units that do not count")
        a, b = self.value(grouped(left, operation)), self.value(grouped(right, operation))
        if isinstance(operation, ast.BitOr):
            require("number" not in (a.kind, b.kind), "a union of letters")
            kind = "set" if a.kind == b.kind == "set" else "union"
            return Shape(kind, elements(a) | elements(b))
        if b.kind == "set" and isinstance(operation, ast.Sub):
            return without(a, b)
        if isinstance(operation, ast.Mult):
            return times(a, b)
        if a.kind in ("matrix", "()") and isinstance(operation, SUMS):
            return elementwise(OPERATIONS[type(operation)], a, b)
        return OPERATIONS[type(operation)](a, b)

    def called(self, name, nodes):
        """The value of a function, a shape, or an unknown function f_(x)."""
        if name == "such":
            return self.such(*nodes)
        if name in CALLED:
            return call_function(name, self.values([grouped(node, None) for node in nodes]))
        values = self.values(nodes)
        if name in ("leftopen", "rightopen"):
            require(len(values) == 2, "an interval of two ends")
            return Shape(name, values)
        if name == "vector":
            return Shape("vector", values)
        if name == "matrix":
            width = len(values[0].items)
            require({len(row.items) for row in values} == {width}, "rows of different lengths")
            items = tuple(item for row in values for item in row.items)
            return Shape("matrix", items, f"{len(values)} x {width}")
        if name == "percent":
            return values[0] * HUNDREDTH if self.percent == "value" else values[0]
        require(name.endswith("_") and values, "a call that no answer has")
        value = unknown(name, *values)
        return Number(value.real, 0, ("?", name, *[argument.tree for argument in values]))

    def such(self, variable, condition):
        """The set of a variable with a condition: the interval in which the condition says it is.

        The variable may be said to be real; any other set of numbers is left undecided.
        """
        if isinstance(variable, ast.Compare):
            is_real = self.value(variable).items == REALS
            require(is_real, "a variable in another set")
            variable = variable.left
        name = name_of(variable)
        require(name, "no variable")
        value = dataclasses.replace(self, variable=name).value(condition)
        require(value.kind == "is" and value.name == name, "a condition on something else")
        require(is_set_of_numbers(value.items), "a condition that is no interval")
        return value.items

    def relation(self, node):
        """What a chain of relations says: an equation, what a name is, or in which set it lies."""
        nodes = [node.left, *node.comparators]
        signs = [type(sign).__name__ for sign in node.ops]
        if set(signs) <= {"Gt", "GtE"}:  # read from right to left, the chain ascends
            nodes = nodes[::-1]
            signs = [sign.replace("G", "L") for sign in signs[::-1]]
        names = [name_of(side) for side in nodes]
        if self.variable:
            names = [name if name == self.variable else "" for name in names]
        if set(signs) == {"Eq"}:
            return self.equation(nodes, names)
        if signs in (["In"], ["NotEq"]):
            value = self.value(nodes[1])
            if not names[0]:
                require(signs == ["NotEq"], "a value in a set")
                return Shape("unequal", self.value(nodes[0]) - value)
            if signs == ["NotEq"]:
                value = without(REALS, Shape("set", frozenset([value])))
            return Shape("is", value, names[0])
        return self.inequality(nodes, names, " ".join(signs))

    def equation(self, nodes, names):
        """x = v, v = x, x = y = v or an equation of two sides; x = 2 + 3 = 5 is x = 5."""
        if not names[0] and names[-1]:
            nodes, names = nodes[::-1], names[::-1]
        count = next((i for i, name in enumerate(names) if not name), len(names) - 1)
        count = max(1, count)
        sides = self.values(nodes[count:])
        require(all(same(sides[0], side) for side in sides[1:]), "a chain of different values")
        if not names[0]:
            return Shape("equation", self.value(nodes[0]) - sides[-1])
        bound = None
        function = re.fullmatch(r"(\w+)\(([a-z]_)\)", names[0])
        if function and count == 1:
            evaluator = Evaluator(self.constants, self.units, self.percent, function[2])
            bound = evaluator.value(nodes[-1])
            is_clear = bound != sides[-1] or not Reading(None, ast.unparse(nodes[-1])).letters
            require(is_clear, "a function of one letter whose value has another")
            names[0] = f"{function[1]}()"
        return Shape("is", sides[-1], " = ".join(names[:count]), bound)

    def inequality(self, nodes, names, signs):
        """x < v is the interval of x; otherwise left side minus right side, and the sign."""
        if signs in ("Lt", "LtE"):
            left, right = self.values(nodes)
            if names[0] and not names[1]:
                kind = INTERVALS[f"Lt {signs}"]
                return Shape("is", Shape(kind, (MINUS_INFINITY, right)), names[0])
            if names[1] and not names[0]:
                kind = INTERVALS[f"{signs} Lt"]
                return Shape("is", Shape(kind, (left, INFINITY)), names[1])
            return Shape(signs, left - right)
        require(signs in INTERVALS and names[1], "a chain of relations")
        ends = (self.value(nodes[0]), self.value(nodes[2]))
        return Shape("is", Shape(INTERVALS[signs], ends), names[1])


def grouped(node, operation):
    """What stands in square brackets where they group it: [x + 1] y, [n(n + 1)/2]^2, ln[2x].

    Not in [x] y and [x/2] + 1, where they may mean the floor.
    """
    if not isinstance(node, ast.List) or len(node.elts) != 1:
        return node
    inner = node.elts[0]
    is_term = isinstance(inner, ast.BinOp)
    is_sum = is_term and isinstance(inner.op, SUMS)
    return inner if is_sum or (is_term and not isinstance(operation, SUMS)) else node


def bracketed(value):
    """[5] is 5; any other number in brackets may be its floor, or a list."""
    is_clear = value.kind != "number" or is_whole_value(value)
    return value if is_clear else Shape("bracketed", value)


def is_whole_value(value):
    """Whether a value is a whole number."""
    fraction = value.fraction() if value.kind == "number" else None
    return fraction is not None and fraction.denominator == 1


def times(a, b):
    """The product of two values: of numbers, or of a number with a matrix or a tuple."""
    if a.kind == b.kind == "number":
        return a * b
    if a.kind in ("matrix", "()"):
        a, b = b, a
    require(a.kind == "number" and b.kind in ("matrix", "()"), "a product of shapes")
    return Shape(b.kind, tuple(times(a, item) for item in b.items), b.name)


def elementwise(operation, a, b):
    """The sum or the difference of two matrices or tuples."""
    require((a.kind, a.name) == (b.kind, b.name), "a sum of different shapes")
    require(len(a.items) == len(b.items), "a sum of different lengths")
    return Shape(a.kind, tuple(map(operation, a.items, b.items)), a.name)


def joined(operation, values):
    """What values joined by and, or by or are: of intervals of one name their union, or what they
    have in common; otherwise a list, of values of one name where it is or that joins them."""
    names = {value.name for value in values if value.kind == "is"}
    are_sets = all(is_set_of_numbers(unnamed(value)) for value in values)
    if are_sets and len(names) <= 1 and isinstance(operation, ast.Or):
        union = Shape("union", frozenset().union(*[elements(unnamed(value)) for value in values]))
        return Shape("is", union, *names) if names else union
    if are_sets and len(names) == 1 and len(values) == 2:
        return Shape("is", common_part(*map(unnamed, values)), *names)
    are_conditions = any(value.kind == "is" and is_set_of_numbers(value.items) for value in values)
    require(not are_conditions, "several conditions")
    are_statements = any(value.kind in RELATIONS for value in values) or len(names) > 1
    require(not (are_statements and isinstance(operation, ast.Or)), "statements of which one holds")
    are_letters = any(is_letter(value) for value in values)
    require(not are_letters, "letters, which may be statements")
    return bare_list(values)


def is_letter(value):
    """Whether a value is a single letter."""
    return value.kind == "number" and isinstance(value.tree, tuple) and value.tree[0] == "symbol"


def is_half_line(value):
    """Whether a value is an interval with one end, as x > 3 is."""
    return value.kind in INTERVALS.values() and bool(INFINITIES.intersection(value.items))


def common_part(a, b):
    """The interval of what is in both a half-line to the right and one to the left."""
    if a.items[0] == MINUS_INFINITY:
        a, b = b, a
    kinds = set(INTERVALS.values())
    require({a.kind, b.kind} <= kinds and a.items[1] == INFINITY, "no half-lines")
    is_clear = b.items[0] == MINUS_INFINITY and real_size(a.items[0]) < real_size(b.items[1])
    require(is_clear, "no half-lines, or nothing in common")
    is_closed = (a.kind == "rightopen", b.kind == "leftopen")
    kind = {(0, 0): "()", (1, 1): "[]", (0, 1): "leftopen", (1, 0): "rightopen"}[is_closed]
    return Shape(kind, (a.items[0], b.items[1]))


def is_set_of_numbers(value):
    """Whether a value is an interval or a union."""
    return value.kind in ("union", "leftopen", "rightopen", "()", "[]")


OPEN_ABOVE = {"()": "()", "leftopen": "()", "[]": "rightopen", "rightopen": "rightopen"}
OPEN_BELOW = {"()": "()", "rightopen": "()", "[]": "leftopen", "leftopen": "leftopen"}


def without(interval, points):
    """The union of intervals that is left of one where points are taken out of its inside."""
    require(interval.kind in INTERVALS.values(), "no interval to take points out of")
    parts = [interval]
    for point in sorted(points.items, key=real_size):
        last = parts.pop()
        left, right = last.items
        require(real_size(left) < real_size(point) < real_size(right), "a point at an end")
        parts.append(Shape(OPEN_ABOVE[last.kind], (left, point)))
        parts.append(Shape(OPEN_BELOW[last.kind], (point, right)))
    return Shape("union", frozenset(parts))


def real_size(value):
    """A number without letters, or infinity, as a float."""
    if value.kind == "infinity":
        return math.inf if value == INFINITY else -math.inf
    digits_of_value = digits(value.tree, {"pi_": DIGITS.pi(), "e_": DIGITS.e()})
    require(digits_of_value.imag == 0, "a complex end of an interval")
    return float(digits_of_value.real)


def has_units(operand):
    """Whether units stand in an operand of a sum; of a sum in it, its own operands are asked."""
    is_sum = isinstance(getattr(operand, "op", None), SUMS)
    return not is_sum and re.search(r"\bu0_", ast.unparse(operand)) is not None


def name_of(node):
    """What can be said to be a value, as text: x_, f_(x_), or (x_, y_); "" for any other node."""
    if isinstance(node, ast.Name):
        is_name = node.id.endswith("_") and node.id not in (*CONSTANTS, "pi_", "e_")
        return node.id if is_name else ""
    if isinstance(node, ast.Tuple | ast.Call):
        source = ast.unparse(node)
        is_name = re.fullmatch(r"\([a-z]\w*_(, [a-z]\w*_)*\)|\w+_\([a-z]_\)", source)
        return source if is_name else ""
    return ""


@dataclass
class Reading:
    """An answer that was read."""

    value: object
    source: str = ""  # in Python

    @property
    def units(self):
        """The names of the units in it."""
        return set(re.findall(r"\bu0_(\w+)", self.source))

    @property
    def letters(self):
        """The single letters in it that are variables."""
        return set(re.findall(r"\b([A-Za-z])_", self.source))


WORDS = re.compile("[A-Za-z\"' .]*[A-Za-z]{2}[A-Za-z\"' .]*")
# A run of letters, but no word.
PRODUCT = re.compile(
    "(?!yes|six|any|max|day|why|way|box|key|boy)"
    "(?:[abcd]{2,3}|[bcdfghjklmnpqrstvwxyz]{2,3}|[axyz]{2}|[aexyz]{2}[xyz]|[xyz][aexyz]{2})"
)
SHORT_WORDS = set(words("a an i yes no odd all any one two six ten may red in on up"))
PLAIN = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?")
CHOICE = re.compile(r'\( ?"([A-J])" ?\) ([-\d\\("].*)|\(([A-J])\) ([\d\\].*)')


def read_answer(text, units=True, percent="value", short_units=True):
    """The Reading of a tidy answer. Several items are a bare list. ValueError if there is none."""
    if WORDS.fullmatch(text) and not PRODUCT.fullmatch(text):
        return Reading(words_of(text))
    if ":" in text and "\\" in text and r"\{" not in text:  # a ratio of values
        parts = [read_answer(part, units, percent, short_units) for part in text.split(":")]
        source = " ".join(part.source for part in parts)
        return Reading(Shape("ratio", tuple(part.value for part in parts)), source)
    if ":" in text and r"\{" not in text:  # a ratio, a time
        return Reading(ratio_of(text))
    if re.fullmatch("[A-J]", text):
        return Reading(Shape("choice", None, text))
    choice = CHOICE.fullmatch(text)
    if choice:
        letter, content = [group for group in choice.groups() if group]
        require(not re.search(r"(?:\\and|\\or|,) ?\(?[A-J]\b", content), "two choices")
        reading = read_answer(content, units, percent, short_units)
        return Reading(Shape("choice", reading.value, letter), reading.source)

    values = []
    has_signs = r"\pm" in text or r"\mp" in text  # then there are two values, by either sign
    require(not has_signs or is_one_sign(text), "two signs that may differ")
    for minus in (False, True)[: 1 + has_signs]:
        reader = Reader(text, minus, short_units)
        source = reader.sequence(END)
        require(units or len(set(units_of_items(source))) <= 1, "different units that do not count")
        evaluator = Evaluator(reader.constants, units, percent)
        items = ast.parse(f"[{source},]", mode="eval").body.elts
        by_sign = [evaluator.value(item) for item in items]
        values += [value for value in by_sign if not minus or value not in values]
    if has_signs and all(value.kind == "set" for value in values):
        return Reading(Shape("set", frozenset().union(*map(elements, values))), source)
    return Reading(bare_list(values), source)


def words_of(text):
    """Words, without case. Short ones may be symbols, with case, dots and primes as their name."""
    exact = " ".join(text.replace('"', " ").split()).rstrip(".")
    key = re.sub("[' .]", "", exact.lower())
    is_symbol = (len(key) <= 3 and key not in SHORT_WORDS) or "'" in exact
    return Shape("text", key, exact if is_symbol else "")


def is_one_sign(text):
    """Whether no item of an answer has two plus-or-minus signs, and no tuple has."""
    counts = [len(re.findall(r"\\[pm]{2}\b", part)) for part in re.split(r",|\\and|\\or", text)]
    has_tuple = re.search(r"[(\[][^)\]]*,", text) is not None
    return max(counts) <= 1 and (sum(counts) <= 1 or not has_tuple)


def ratio_of(text):
    """A ratio or a time as words, with case and with the spaces between its parts."""
    exact = re.sub(" ?: ?", ":", text.replace('"', "")).strip()
    return Shape("text", re.sub("[' ]", "", exact.lower()), exact)


def units_of_items(source):
    """The units of each item of a list in Python, as a text."""
    items = re.split(r",| and | or ", source)
    return [" ".join(re.findall(r"\bu0_\w+", item)) for item in items]


def bare_list(values):
    """What values side by side are: a list, or values of one or of more names."""
    if len(values) > 1 and values[0].kind == "is" and values[0].name.startswith("("):
        others = {value.name for value in values if value.kind == "is"} - {values[0].name}
        require(not others, "values of several names")
        solutions = [unnamed(value) for value in values]  # (x, y) = (1, 2), (3, 4)
        return Shape("is", Shape("list", tuple(solutions)), values[0].name)
    values = [item for value in values for item in assignments(value)]
    names = [value.name for value in values if value.kind == "is"]
    if len(values) == 1:
        return values[0]
    are_conditions = all(value.kind == "is" and is_half_line(value.items) for value in values)
    require(not are_conditions, "several conditions, which hold together or one by one")
    # x = 1 or x = 2; x = 1, 2: one name is said to be all of them.
    if len(set(names)) == 1 and values[0].kind == "is":
        return Shape("is", bare_list([unnamed(value) for value in values]), names[0])
    if names:
        require(len(names) == len(values) == len(set(names)), "some values of names, some not")
        return Shape("assignments", tuple(values))
    return Shape("list", tuple(values))


def assignments(value):
    """x = v of each name in (x, y) = (u, v), or the value alone."""
    if value.kind == "assignments" or value.kind == "list":
        return value.items
    if value.kind != "is" or not value.name.startswith("("):
        return [value]
    names = value.name.strip("()").split(", ")
    require(value.items.kind == "()" and len(value.items.items) == len(names), "no such tuple")
    return [Shape("is", item, name) for name, item in zip(names, value.items.items)]


def elements(value):
    """The set of the values in a set, a union or a bare list; of any other the set of itself."""
    return frozenset(value.items if value.kind in ("set", "union", "list") else [value])


def unnamed(value):
    """The value alone where a name is said to be it."""
    return value.items if value.kind == "is" else value


# ---- Equality ----

# Of these, two of different kinds are different; of other kinds they may be two forms of one.
NEVER_THE_SAME = {"number", "infinity", "list", *INTERVALS.values()}
RELATIONS = {"equation", "unequal", "Lt", "LtE"}


def same(a, b):
    """Whether two values are equal: True, False, or None if that is not certain."""
    kinds = {a.kind, b.kind}
    if kinds == {"number"}:
        return same_number(a, b)
    if "choice" in kinds:
        return same_choice(a, b)
    if "assignments" in kinds:
        return same_assignments(a, b)
    if "is" in kinds:
        return same_named(a, b)
    if kinds == {"equation", "number"}:
        return same_curve(a, b)
    if kinds & RELATIONS:
        return same_relation(a, b)
    if "set" in kinds and kinds <= {"set", "list", "number", "()"}:
        has_sets = any(item.kind == "set" for item in elements(a) ^ elements(b))
        items = elements(a) | elements(b)
        is_single = "number" in kinds and len(elements(a)) == len(elements(b)) == 1
        is_part = is_single and not all(map(is_whole_value, items))  # may be {x}, a fractional part
        return None if has_sets or is_part else same_set(elements(a), elements(b))
    if "union" in kinds:  # (1, 2] and [2, 3) make (1, 3), too: this is not looked at
        return same_set(elements(a), elements(b)) or None
    if len(kinds) > 1:
        return False if kinds <= NEVER_THE_SAME and kinds != {"list", "[]"} else None
    return same_items(a, b)


def same_named(a, b):
    """Whether two values are equal of which one at least is that of a name."""
    kinds = {a.kind, b.kind}
    if kinds == {"is"} and a.name != b.name:
        are_numbers = a.items.kind == b.items.kind == "number"
        is_function = "(" in a.name + b.name
        return same_equation(a, b) if are_numbers and not is_function else False
    if kinds == {"is"} and a.bound and b.bound:
        return same(a.bound, b.bound)
    if "equation" in kinds:
        return same_equation(a, b)
    if kinds & {"Lt", "LtE"}:
        return same_relation(inequality_of(a), inequality_of(b))
    return same(unnamed(a), unnamed(b))


def same_items(a, b):
    """Whether two shapes of one kind have the same items."""
    if a == b:
        return True
    if a.kind == "text" and (a.items == b.items or sorted(a.items) == sorted(b.items)):
        return None  # CO and Co; ae and ea
    if a.name != b.name or a.kind in ("text", "infinity"):
        return False
    if a.kind == "bracketed":
        return same(a.items, b.items)
    if a.kind == "list":
        return same_list(a.items, b.items)
    return same_tuple(a.items, b.items)


def same_number(a, b):
    """By the residues where these know all, otherwise by many digits."""
    if a == b:
        return True
    if is_rational(a.tree) and is_rational(b.tree):
        return False
    return same_digits(a.tree, b.tree)


def same_tuple(a, b):
    """Whether two tuples of values are equal, one by one."""
    if len(a) != len(b):
        return False
    return every(same(x, y) for x, y in zip(a, b))


def every(verdicts):
    """True if all verdicts are, False if one is, otherwise None."""
    verdicts = list(verdicts)
    if False in verdicts:
        return False
    return None if None in verdicts else True


def same_list(a, b):
    """Whether two lists hold the same values, each as often, in any order."""
    if len(a) != len(b):
        return False
    rest = list((Counter(b) - Counter(a)).elements())
    for x in (Counter(a) - Counter(b)).elements():
        require(len(rest) <= 10, "a long list")
        verdicts = [same(x, y) for y in rest]
        if True not in verdicts:
            return None if None in verdicts else False
        del rest[verdicts.index(True)]
    return True


def same_set(a, b):
    """Whether two sets hold the same values."""
    only_a, only_b = a - b, b - a
    require(len(only_a) <= 10 and len(only_b) <= 10, "long sets")
    verdicts = [some(same(x, y) for y in b) for x in only_a]
    verdicts += [some(same(x, y) for x in a) for y in only_b]
    return every(verdicts)


def some(verdicts):
    """True if one verdict is, False if all are, otherwise None."""
    verdicts = list(verdicts)
    if True in verdicts:
        return True
    return None if None in verdicts else False


def same_choice(a, b):
    """(C) 12 is C, and it is 12; two choices must agree in all that they have."""
    if a.kind != b.kind:
        choice, other = (a, b) if a.kind == "choice" else (b, a)
        if choice.items is None:
            return same(symbol(f"{choice.name}_"), other)
        return same(choice.items, other)
    if a.name != b.name or a.items is None or b.items is None:
        return a.name == b.name
    return same(a.items, b.items)


def same_assignments(a, b):
    """x = 1, y = 2 of the same names; or the values in a list, in the order of the names."""
    if a.kind == b.kind:
        a_values = {value.name: value.items for value in a.items}
        b_values = {value.name: value.items for value in b.items}
        if a_values.keys() != b_values.keys():
            return None
        return every(same(value, b_values[name]) for name, value in a_values.items())
    named, other = (a, b) if a.kind == "assignments" else (b, a)
    if other.kind == "is" and other.name in ("x_", "y_", "z_", "t_", "w_"):
        other = other.items
    names = [value.name for value in named.items]
    values = [value.items for value in named.items]
    are_indexed = all(re.fullmatch(rf"{names[0][0]}_\w_", name) for name in names)
    are_roots = are_indexed and names[0][0] in "xyztw"  # x_1 = 1, x_2 = 2, in any order
    if are_roots and other.kind in ("list", "set"):
        return same(Shape("list", tuple(values)), other)
    require(other.kind in ("list", "()") and names == sorted(names), "names in no order")
    is_clear = other.kind == "()" or not {"x_", "y_", "z_"} & set(names)
    require(is_clear, "a list that may be the values of one name")
    return same_tuple(values, other.items)


def difference(equation):
    """Left side minus right side of an equation; x = v is one, too."""
    is_equation = equation.kind != "is"
    return equation.items if is_equation else symbol(equation.name) - equation.items


def same_equation(a, b):
    """Whether one equation is a rational multiple of the other; if not, that is not certain."""
    ratio = difference(a) / difference(b)
    require(difference(a).fraction() is None, "an equation without a letter")
    return True if ratio.fraction() is not None else None


def same_curve(a, b):
    """Whether an equation of x and y is y = v, of a bare v with x alone."""
    equation, value = (a, b) if a.kind == "equation" else (b, a)
    if letters_of(value.tree) != {"x_"} or letters_of(equation.items.tree) != {"x_", "y_"}:
        return None
    return same_equation(equation, Shape("is", value, "y_"))


def inequality_of(value):
    """The inequality of a name that lies in an interval with one end; of others themselves."""
    if value.kind != "is":
        return value
    left, right = value.items.items
    strict = {"()": "Lt", "leftopen": "LtE", "rightopen": "LtE"}[value.items.kind]
    if left == MINUS_INFINITY:
        return Shape(strict, symbol(value.name) - right)
    return Shape(strict, left - symbol(value.name))


def same_relation(a, b):
    """The same of equations, and of inequalities with a positive multiple."""
    if a.kind != b.kind:
        return None
    ratio = (a.items / b.items).fraction()
    require(a.items.fraction() is None, "a relation without a letter")
    if ratio is None or (a.kind in ("Lt", "LtE") and ratio < 0):
        return None
    return True


def compact(text):
    """A tidy text without the spaces and braces that separate nothing."""
    text = re.sub(r"(\\[A-Za-z]+) ?\{ ?(\w) ?\}", r"\1 \2 ", text)
    return re.sub("(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


CAPITAL = re.compile(r"\b[A-Z]\w*_\b(?!\()")


def commutes(a, b):
    """Whether two equal sources in Python are equal of matrices, points and molecules, too.

    Where an answer multiplies different names in capitals, both must have them in the same order,
    without powers of them together: A B is not B A, and (A + B)^2 is not A^2 + 2 A B + B^2.
    """
    orders = [CAPITAL.findall(source) for source in (a, b)]
    if len(set(orders[0])) < 2 and len(set(orders[1])) < 2:
        return True
    products = [capital_products(ast.parse(f"({source})").body[0].value) for source in (a, b)]
    kinds = set().union(*products)
    return not kinds or (orders[0] == orders[1] and kinds == {"*"})


def capital_products(node):
    """{"*", "^"}: which of these a tree has of different names in capitals."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult | ast.Pow):
            is_power = isinstance(part.op, ast.Pow)
            left = set(CAPITAL.findall(ast.unparse(part.left)))
            right = set() if is_power else set(CAPITAL.findall(ast.unparse(part.right)))
            is_mixed = len(left | right) > 1 and (is_power or (left and right))
            if is_mixed:
                found.add("^" if is_power else "*")
    return found


def answers_equal(answer, gold, percent="value"):
    """True, False, or None when undecided (which counts as not equal). Symmetric; never raises.

    percent: "value": 25% is 0.25, and not 25. "either": a percent sign may also be left out, as in
    the benchmarks whose own graders remove it: 25% is 0.25, and it equals 25.
    """
    if answer is None or gold is None:
        return None
    try:
        SPENT.functions = 0
        texts = sorted([str(answer).strip(), str(gold).strip()])  # their order cannot matter
        return verdict(*texts, percent)
    except Exception:
        return None


def verdict(answer, gold, percent):
    """answers_equal of two texts, which may raise."""
    if not answer or not gold:
        return None
    if answer == gold:
        return True
    if PLAIN.fullmatch(answer) and PLAIN.fullmatch(gold):
        return Fraction(answer) == Fraction(gold)
    require(max(len(answer), len(gold)) <= MAX_CHARS, "a long text")
    answer, gold = tidy(answer), tidy(gold)
    if compact(answer) == compact(gold):
        return True
    a, b = read_answer(answer), read_answer(gold)

    # The m of 5 m is a variable if it is one in the other answer.
    if b.letters & set(SHORT_UNITS):
        a = read_answer(answer, short_units=False)
    if a.letters & set(SHORT_UNITS):
        b = read_answer(gold, short_units=False)
    # Units on one side only do not count.
    if a.units and not b.units:
        a = read_answer(answer, units=False)
    elif b.units and not a.units:
        b = read_answer(gold, units=False)
    equal = same(a.value, b.value)
    if (
        equal is False and a.units and b.units and a.units != b.units
    ):  # 5 cm is not 5 m, but 100 cm may be 1 m
        a, b = read_answer(answer, units=False), read_answer(gold, units=False)
        require(same(a.value, b.value) and not a.units & SYNONYMS, "units of one quantity")
    if equal and not commutes(a.source, b.source):
        return None
    if percent == "either" and equal is not True and ("%" in answer) != ("%" in gold):
        a, b = read_answer(answer, percent="sign"), read_answer(gold, percent="sign")
        equal = same(a.value, b.value)
    return equal


# ---- Finding the answer in a completion ----

TAIL = 20_000  # characters: the answer stands at the end, and a bounded look takes bounded time
BOX_COMMAND = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BARE_BOX = re.compile(r"[-+]?[\w.,/%]*[\w%]")  # \boxed 7
GAP = r"(?:[\s$()~]|\\q?quad|\\[\[\]()]){0,12}"
JOINED = re.compile(GAP + r"(?:,|,?\s?(?:\\text\{\s?)?(?:and|or)\b\s?\}?)" + GAP)
HASH = re.compile(r"####[ \t]*([^\n]*)")
HEADING = re.compile(r"(?:\d+\.\s+)?[A-Za-z]{2,}\b[ \t:.*]+\S")  # Step 2: Solve
PHRASE = re.compile(r"(?i)\banswer\**\s*(?:\bis\b|\bwould be\b|\bwill be\b|[:=])[\s*:]*")
SAYS = re.compile(r"\b(?:is|are)\b")
# The first clause of a sentence: what follows a reason, a condition or "(see above)" is none of it.
CLAUSE = r"because|since|which|so|where|when|whenever|if|but|while|whereas|unless|as|provided|for"
SENTENCE = re.compile(
    rf"[^\n]{{0,500}}?(?=\.\s|\.?\**$|,?\s(?:{CLAUSE})\b|,\s(?:and|with)\s(?!or\b)[A-Za-z]{{2}}|"
    r"\s\((?!mod)[A-Za-z]{3})",
    re.MULTILINE,
)


@dataclass
class Box:
    """A \\boxed{...} in a text."""

    start: int
    end: int = 0
    content: str | None = None  # None: it was cut off


def boxes_in(text):
    """The boxes in a text, in order; of boxes in one another the innermost alone."""
    closing = closing_braces(text)
    boxes = []
    for match in BOX_COMMAND.finditer(text):
        box = Box(match.start())
        opening = match.end()
        bare = BARE_BOX.match(text, opening)
        if opening in closing:
            box.end = closing[opening] + 1
            box.content = text[opening + 1 : closing[opening]]
        elif bare:
            box.end, box.content = bare.end(), bare[0]
        is_inside = boxes and (boxes[-1].end > box.start or boxes[-1].content is None)
        if is_inside and box.content is not None:
            boxes.pop()
        boxes.append(box)
    return boxes


def closing_braces(text):
    """{place of an opening brace: place of the one that closes it}."""
    closing = {}
    opened = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def boxed_answer(text, as_list):
    """What the last box holds; as_list: and the boxes before it that "and" joins to it.

    None where the last box was cut off: then nothing before it was meant to be the answer.
    """
    boxes = [box for box in boxes_in(text) if box.content is None or box.content.strip()]
    if not boxes:
        return ""
    if boxes[-1].content is None:
        return None
    answers = [boxes[-1].content]
    for i in range(len(boxes) - 1, 0, -1):
        before = boxes[i - 1]
        if not as_list or not JOINED.fullmatch(text, before.end, boxes[i].start):
            break
        answers.insert(0, before.content)
    return ", ".join(answers)


def hash_answer(text, as_list):
    """What stands behind the last ####, as GSM8K writes it, that is no heading."""
    lines = [match[1].strip(" *") for match in HASH.finditer(text)]
    answers = [line for line in lines if line and not HEADING.match(line)]
    return answers[-1] if answers else ""


def phrase_answer(text, as_list):
    """What the last "the answer is" says, to the end of the sentence, or to its reason."""
    for match in reversed(list(PHRASE.finditer(text))):
        sentence = SENTENCE.match(text, match.end())
        if sentence and sentence[0].strip(" *"):  # the largest n is 34
            return SAYS.split(sentence[0])[-1].strip(" *")
    return ""


FORMS = {"boxed": boxed_answer, "hash": hash_answer, "phrase": phrase_answer}
ACCEPTED = ("boxed", "hash", "phrase")  # by the built-in tasks, which ask for the first


def extract_answer(text, how, as_list=False):
    """The last answer in the form `how` (of several: in the first that occurs), or None.

    as_list: boxes joined by "and" are a list. Where the last box was cut off there is no answer.
    Never raises, whatever the text.
    """
    try:
        text = str(text)[-TAIL:]
    except Exception:  # what cannot be a text, as an int of 5,000 digits
        return None
    for form in [how] if isinstance(how, str) else how:
        answer = FORMS[form](text, as_list)
        if answer is None:
            return None
        if answer.strip(" ,\n"):
            return answer.strip().rstrip(",")
    return None


def is_list(gold):
    """Whether a gold answer has several values."""
    try:
        SPENT.functions = 0
        gold = str(gold)
        require(len(gold) <= MAX_CHARS, "a long text")
        return read_answer(tidy(gold)).value.kind in ("list", "set", "assignments")
    except Exception:
        return False


# --------------------------------------------------------------------------------------------------
# 4. Rewards
# A completion earns the numbers of its task's judge and the values of reward functions, which have
# TRL's signature: f(completions, **columns) -> list of numbers, one a completion. They are called
# by keyword. Columns are lists, too: each field of the task's rows (question, answer, ...), prompts
# (the questions), completion_ids, finish ("stop" or "length"); max_new_tokens is one number.


ASKS_FOR_VALUE = re.compile(r"(?i)\b(?:fraction|decimal|ratio|probability)\b")


def judge_answer(completion, row, percent="value"):
    """The judge of text: accuracy: the answer equals row["answer"]; answered: there is one, in any
    of the ACCEPTED forms; format: in a box; undecided: the verifier cannot tell. percent: as in
    answers_equal; a question that asks for a fraction or a decimal gets its value."""
    answer = find_answer(completion, row)
    if answer is None:
        return {"accuracy": 0.0, "answered": 0.0, "format": 0.0, "undecided": 0.0}
    if ASKS_FOR_VALUE.search(str(row.get("question"))):
        percent = "value"
    equal = answers_equal(answer, row["answer"], percent)
    is_boxed = extract_answer(completion, "boxed") is not None
    numbers = {"accuracy": float(equal is True), "answered": 1.0, "format": float(is_boxed)}
    return numbers | {"undecided": float(equal is None)}


def find_answer(completion, row):
    """The answer in a completion as text, or None."""
    return extract_answer(completion, ACCEPTED, as_list=is_list(row.get("answer")))


def judge_box(completion, row):
    """The judge of boxes: IoU >= 0.5 with the gold box is a hit (Sec. 4.1).

    Both have the unit that the question states: nothing is guessed from the numbers. format: the
    completion holds a list of four numbers in brackets.
    """
    has_box = parse_box(completion) is not None
    iou = box_iou(completion, row["answer"])
    is_listed = has_box and LISTED_BOX.search(completion) is not None
    numbers = {"accuracy": float(iou >= 0.5), "answered": float(has_box)}
    return numbers | {"format": float(is_listed), "undecided": 0.0, "iou": iou}


def find_box(completion, row):
    """The last box in a completion as text, "(x0, y0, x1, y1)", or None."""
    box = parse_box(completion)
    return None if box is None else str(box)


def overlong(completions, completion_ids, max_new_tokens, **columns):
    """Soft overlong punishment, DAPO (2503.14476) Eq. 13, as a reward function.

    0 up to a buffer before max_new_tokens tokens, then linear to -1. Our choice: the buffer is a
    fifth of max_new_tokens, as DAPO's 4,096 of 20,480.
    """
    buffer = max_new_tokens // 5
    values = []
    for ids in completion_ids:
        excess = len(ids) - (max_new_tokens - buffer)
        share = excess / buffer if buffer else float(excess > 0)
        values.append(-min(1.0, max(0.0, share)))
    return values


REWARD_FUNCTIONS = {"overlong": overlong}  # known by name, and always scored


@dataclass(frozen=True)
class Reward:
    """One summand of the reward."""

    name: str
    weight: float
    function: Callable | None = None  # None: a number of the judge's


def load_rewards(items, task):
    """Rewards from ["accuracy=1", "overlong=1", "my_rewards.py:brevity=0.2"].

    ValueError for a name that is neither one of the judge's numbers nor of REWARD_FUNCTIONS nor
    FILE.py:FUNCTION, for a weight that is no number, a name twice, and weights that are all 0.
    """
    rewards = []
    for item in items:
        source, _, weight = item.rpartition("=")
        try:
            weight = float(weight)
        except ValueError:
            weight = math.nan
        if not source or not math.isfinite(weight):
            raise ValueError(f"--reward takes NAME=WEIGHT with a number as weight, not {item}")

        path, _, name = source.rpartition(":")
        function = REWARD_FUNCTIONS.get(source)
        if path.endswith(".py"):
            function = getattr(load_file(path), name, None)
            if not callable(function):
                raise ValueError(f"the file {path} has no function '{name}' to reward with")
            if name in {*task.reward_names, *REWARD_FUNCTIONS, *RESERVED}:
                raise ValueError(f"--reward {source}: there is a reward '{name}' already")
        elif source not in task.reward_names and function is None:
            names = ", ".join([*task.reward_names, *REWARD_FUNCTIONS])
            raise ValueError(f"unknown reward '{source}': choose from {names}, FILE.py:FUNCTION")
        rewards.append(Reward(name, weight, function))

    names = {reward.name for reward in rewards}
    if len(names) < len(rewards) or not any(reward.weight for reward in rewards):
        raise ValueError(f"--reward {' '.join(items)}: each name once, and a weight that is not 0")
    return rewards


def score_rewards(rewards, task, completions, rows, finishes, completion_ids, max_new_tokens):
    """What each completion (a text) earns: a list of {name: float}, first what the judge gives.

    rows: the task's, one a completion. finishes: "stop" or "length". completion_ids: token ids.
    ValueError where a reward function fails or returns anything but one number a completion.
    """
    scores = []
    for completion, row, finish in zip(completions, rows, finishes):
        scores.append(task.judge(completion, row, finish))

    fields = dict.fromkeys(field for row in rows for field in row)
    columns = {field: [row.get(field) for row in rows] for field in fields}
    columns |= {"completions": completions, "completion_ids": completion_ids, "finish": finishes}
    columns |= {"prompts": columns.get("question"), "max_new_tokens": max_new_tokens}
    functions = {reward.name: reward.function for reward in rewards if reward.function}
    for name, function in {**REWARD_FUNCTIONS, **functions}.items():
        where = f"the reward function '{name}'"
        values = call(where, function, **columns)
        if not hasattr(values, "__len__") or len(values) != len(completions):
            raise ValueError(f"{where} must return {len(completions)} numbers, not {values!r:.80}")
        for score, value in zip(scores, values):
            score.setdefault(name, as_number(value, f"{where} must return numbers: one"))
    return scores


def weighted_sum(values, rewards):
    """The reward of a completion. values: {name: float}, one of score_rewards."""
    return sum(reward.weight * values[reward.name] for reward in rewards)


# ---- Boxes ----

COORDINATE = r"(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)"
BOX_START = r"(?:<box>|box_start\|>|[\[({])[\s\[(]{0,9}"
BOX_END = r"[\s\])]{0,9}(?:</box>|<\|box_end|[\])}])"
BOX = re.compile(BOX_START + r"[\s,()\[\]]{1,9}".join([COORDINATE] * 4) + BOX_END)
LISTED_BOX = re.compile(r"\[\s{0,9}" + r"\s{0,9},\s{0,9}".join([COORDINATE] * 4) + r"\s{0,9}\]")


def parse_box(text):
    """(x0, y0, x1, y1) of the last box in a JSON text, a list or a <box>; None without area."""
    without_keys = re.sub(r'"[a-z]\w{0,5}"\s*:\s*(?=[-0-9])', "", str(text)[-TAIL:])  # {"x1": 3}
    boxes = BOX.findall(without_keys)
    if not boxes:
        return None
    x0, y0, x1, y1 = map(float, boxes[-1])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def box_iou(completion, gold):
    """Intersection over union, in [0, 1], of the last box in a completion with the gold box."""
    a, b = parse_box(completion), parse_box(gold)
    if a is None or b is None:
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(0.0, width) * max(0.0, height)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return intersection / (area_a + area_b - intersection)


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """Compare two answers, or show a task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs=2, metavar=("ANSWER", "GOLD"), help="are these equal?")
    parser.add_argument("--task", default=DEFAULT_WORLD, help=f"show a task: {TASKS}, or any name")
    parser.add_argument("--data", help="its rows: a JSONL file or hub:... (default: its own)")
    args = parser.parse_args(argv)
    if args.check:
        verdicts = {True: "equal", False: "not equal", None: "undecided (counts as not equal)"}
        print(verdicts[answers_equal(*args.check)])
        return
    task = load_task(args.task, test=args.data, splits=("test",))
    print(f"first question: {task.test[0]['question']}{task.instruction}")
    print(f"gold answer: {task.test[0]['answer']}")
    print(f"{len(task.test)} rows")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"rewards.py: {error}")
