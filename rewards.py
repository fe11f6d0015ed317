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
import importlib.util
import io
import json
import math
import operator
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path

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

    def __post_init__(self):
        """Learn the names of the judge's numbers: it judges an empty and a right completion."""
        self.judge_function = self.judge_function or judge_answer
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
        return Task(name, **rows, instruction=BOXED)
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
# An answer is never run as code and never rounded. It is spelled as a Python expression, Python's
# own parser makes a tree of that, and evaluate() walks the tree. Numbers are computed modulo a
# fixed 280-bit prime, where + - * / and powers keep their laws and nothing grows. Equal numbers
# have equal residues. Unequal ones differ: fractions of up to 40 digits for certain, all others but
# for odds below 1e-60 (Schwartz 1980). What does not parse, or is too large, is *undecided*.
#
# The rules. 0.33 != 1/3. A percent is its value: 50% = 0.5, 50% != 50. A unit or a currency counts
# only where both answers have one: 5 = 5 cm, 5 cm != 5 m. `x = v` and `x in v` equal a bare v; two
# names must agree. A bare list equals a set, in any order; a tuple is ordered, its brackets count,
# it equals no list. 1,234 is a number, (1,234) a pair. 52_8 equals neither 52 nor 42: the base was
# asked for. Words are compared without case.

# Beyond any of these, or where reading it ends in an error, an answer is undecided.
MAX_CHARS, MAX_BRACKETS, MAX_EXPONENT, MAX_FACTORIAL = 500, 60, 10_000, 2100


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
    kind = "number"

    def __add__(self, other):
        return Number((self.real + other.real) % PRIME, (self.imaginary + other.imaginary) % PRIME)

    def __sub__(self, other):
        return Number((self.real - other.real) % PRIME, (self.imaginary - other.imaginary) % PRIME)

    def __mul__(self, other):
        real = self.real * other.real - self.imaginary * other.imaginary
        imaginary = self.real * other.imaginary + self.imaginary * other.real
        return Number(real % PRIME, imaginary % PRIME)

    def __truediv__(self, other):
        norm = other.real**2 + other.imaginary**2
        factor = pow(norm, -1, PRIME)  # a ValueError if other = 0
        return self * Number(other.real * factor % PRIME, -other.imaginary * factor % PRIME)

    def fraction(self):
        """The fraction n/d, both below 2^64, with this residue, or None. There is at most one."""
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
    """Any other value: a tuple, a set, an interval, an equation, infinity, words: no arithmetic."""

    kind: str  # of kind "is" are values that something is said to be: x = 5, with its name
    items: object
    name: str = ""


def number(fraction):
    """The Number of a whole number or a Fraction."""
    return Number(fraction.numerator * pow(fraction.denominator, -1, PRIME) % PRIME)


ZERO, ONE, MINUS, IMAGINARY = Number(0), Number(1), Number(PRIME - 1), Number(0, 1)
HALF, HUNDREDTH = number(Fraction(1, 2)), number(Fraction(1, 100))
INFINITY, MINUS_INFINITY = Shape("infinity", "infty_"), Shape("infinity", "minfty_")


@lru_cache(maxsize=4096)
def symbol(*name):
    """The random number that a letter, a unit or a function we cannot expand stands for."""
    return Number(random.Random(str(name)).randrange(PRIME))


def power(base, exponent):
    """base ** exponent: exact for a whole exponent or a rational base, otherwise a symbol."""
    fraction = exponent.fraction()
    if fraction is None or (fraction.denominator > 1 and base.fraction() is None):
        return symbol(base, "to the", exponent)
    n = fraction.numerator
    require(abs(fraction) <= MAX_EXPONENT and (base != ZERO or n > 0), "a huge power or 0 / 0")
    if fraction.denominator > 1:
        base = root(base, fraction.denominator)
    if base.imaginary == 0:
        return Number(pow(base.real, n, PRIME))
    require(abs(n) <= 100, "a huge complex power")
    return math.prod([base if n > 0 else ONE / base] * abs(n), start=ONE)


def root(x, degree):
    """The root of a rational x. Odd roots are real (the third root of -8 is -2), sqrt(-4) is 2i."""
    is_positive = x.fraction() >= 0
    require(is_positive or degree % 2 == 1 or degree == 2, "a complex root")
    sign, radicand = ONE, x.real
    if not is_positive:
        sign, radicand = IMAGINARY if degree == 2 else MINUS, -x.real % PRIME

    exponent = pow(degree, -1, PRIME // 2)
    residue = pow(radicand, exponent, PRIME)
    if pow(residue, degree, PRIME) != radicand:
        # A prime factor above 200 may make the radicand no square; then minus it is one.
        residue = pow(-radicand, exponent, PRIME)
        sign = sign * symbol("root of -1", degree)
    return sign * Number(residue)


def call_function(name, x):
    """A function of x where we can expand it, else the symbol that name and argument stand for."""
    if name == "exp":
        return power(symbol("e_"), x)
    if name == "sqrt":
        return power(x, HALF)
    if name == "percent_":
        return x * HUNDREDTH
    fraction = x.fraction()
    if name == "abs" and fraction is not None:
        return number(abs(fraction))
    is_whole = fraction is not None and fraction.denominator == 1
    if name == "factorial_" and is_whole and 0 <= fraction <= MAX_FACTORIAL:
        return Number(math.factorial(fraction.numerator) % PRIME)
    return symbol(name, x)


# ---- Spelling: RULES remove decoration and ambiguity, translate() writes Python ----


def pairs(text):
    """{"a": "b", "c": "d"} of the text "a@b c@d"."""
    return dict(pair.split("@") for pair in text.split())


FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp"
GREEK = "pi|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|sigma|tau|phi|omega"
SHAPES = {"matrix", "leftopen", "rightopen"}
CALLED = {*FUNCTIONS.split("|"), *SHAPES, "frac", "sqrt", "abs"}
NAMES = {*GREEK.split("|"), "infty", "minfty"}
SCALES = {"percent": Fraction(1, 100), "dozen": 12, "hundred": 100, "thousand": 1000}
SCALES |= {"million": 10**6, "billion": 10**9}
UNITS = pairs(
    "cm@centimeter km@kilometer mm@millimeter m@meter in@inch inche@inch ft@foot feet@foot yd@yard "
    "mi@mile mph@mph g@gram kg@kilogram mg@milligram lb@pound oz@ounce mL@milliliter L@liter "
    "s@second sec@second min@minute h@hour hr@hour day@day deg@degree cup@cup men@men N@newton "
    "J@joule W@watt V@volt usd@dollar"
)
COMPUTING = (  # words after a number that are no units
    r"half|halve|third|quarter|squared|cubed|factorial|plus|minus|times|over|modulo|less|more|choose|"
    r"below|under|negative|inverse|percentage|divided|root|trillion|(?!month$)\w*th"
)
COMMANDS = pairs(
    r"dfrac@\frac tfrac@\frac cfrac@\frac cdot@* times@* div@/ le@<= leq@<= ge@>= geq@>= ne@!= "
    r"neq@!= lt@< gt@> vert@| lvert@| rvert@| lbrace@\{ rbrace@\} approx@= degree@^\circ "
    "left@ right@ big@ Big@ bigl@ bigr@ displaystyle@ boxed@ mathbf@ mathbb@ quad@"
)
SIGNS = pairs(
    r"−@- –@- ×@* ·@* ÷@/ ≤@<= ≥@>= ≠@!= ²@^2 ³@^3 ½@\frac12 π@\pi ∞@\infty √@\sqrt °@^\circ "
    r"∪@\cup ±@\pm ∈@\in"
)
PYTHON = pairs(r"{@( }@) \{@{ \}@} ^@** =@== ;@, \cup@|")  # other signs are Python's, too
PYTHON |= {"!": "** factorial_", "%": "** percent_", r"\in": " in "}
PYTHON |= {f"\\{name}": name for name in CALLED} | {f"\\{name}": f"{name}_" for name in NAMES}
BRACED = r"[^{}]*"
for _ in range(5):  # what braces hold, with up to five more pairs inside
    BRACED = rf"(?:\\.|[^{{}}\\]|\{{{BRACED}\}})*"


def ascii_sign(match):
    return f" {SIGNS.get(match[0], match[0])} "


def plain_command(match):
    return COMMANDS.get(match[1], match[0]) or " "


def matrix_call(match):
    rows = match[1].replace("&", ",").replace(r"\\", ",),(")
    return rf"\matrix(({rows},))"


def without_commas(match):
    return match[0].replace(",", "")


def quoted_words(match):
    return re.sub("[A-Za-z]{2,}", r' "\g<0>" ', f" {match[1]} ")


def mixed_number(match):
    whole, numerator, denominator = match.groups()
    is_proper = int(numerator) < int(denominator)  # 1 5/4 may be a product: undecided
    return f"{{{whole}+{numerator}/{denominator}}}" if is_proper else "?"


def repeating_decimal(match):
    whole, digits, repeated = match.groups()
    return f"{{{whole}.{digits}0+{repeated}/{'9' * len(repeated)}{'0' * len(digits)}}}"


def function_power(match):
    name, exponent, *arguments = match.groups()
    argument = arguments[0] or arguments[1] or arguments[2]
    return rf"(\{name}{{{argument}}})^{exponent or 1}"


RULES = []  # (pattern, replacement), applied in this order: many rely on those before them


def rule(pattern, replacement):
    """Add a rewriting rule. replacement: text with \\1 for a group, or a function of the match."""
    RULES.append((re.compile(pattern), replacement))


# Behind (or above) each rule: an example, before -> after.
rule(r"[^\x00-\x7f]", ascii_sign)  # 3×4 -> 3 * 4
rule(r"\\([A-Za-z]+)\*?", plain_command)  # \dfrac{1}{2} -> \frac{1}{2}
# \begin{pmatrix}1&2\\3&4\end{pmatrix} -> \matrix((1,2,),(3,4,))
rule(r"\\begin ?\{[pb]matrix\}(.*?)(?:\\\\ ?)?\\end ?\{[pb]matrix\}", matrix_call)
rule(r"(?<=\d)(?:,\\!|\{,\}|\\,) ?(?=\d{3})", "")  # 1{,}234 -> 1234
rule(r"(?<!\\)\\[,;:!> ]|~", " ")  # 3\,x -> 3 x
rule(r"^\\[(\[]|\\[)\]]$|^\*\*|\*\*$|`", " ")  # \(5\) -> 5
rule(r"\*\*", "^")  # 2**3 -> 2^3
rule(r"\\%", "%")  # 50\% -> 50%
# 1,234 -> 1234 (not in brackets, where commas separate)
rule(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?![^(\[{]*(?:[)\]]|\\\}))", without_commas)
rule(r"(?:\\\$|^\$(?=[^$]*$)) ?(\d[\d.]*)", r'\1 "dollar" ')  # \$5 -> 5 "dollar"
rule(r"(?<!\\)\$", " ")  # $5$ -> 5
rule(r"^=|(?<!\.)\.$", "")  # =5. -> 5
rule(r"^([A-Za-z])\(([A-Za-z])\)(?= ?=)", r"\1_\2")  # f(x) = 2 -> f_x = 2
rule(r"\\(?:text(?:bf|it|rm)?|mbox|mathrm) ?\{([^{}]*)\}", quoted_words)  # \text{cm} -> "cm"
rule(r"\\frac ?(\d)", r"\\frac{\1}")  # \frac12 -> \frac{1}2
rule(rf"(\\frac ?\{{{BRACED}\}}) ?(\d)", r"\1{\2}")  # \frac{1}2 -> \frac{1}{2}
# 1\frac{4}{5} -> 1 4/5
rule(r"(?<![\d.^_A-Za-z])(\d+) ?\\frac ?\{(\d+)\} ?\{(\d+)\}", r"\1 \2/\3")
rule(r"(?<![\d.^_A-Za-z])(\d+) (\d+)/(\d+)", mixed_number)  # 1 4/5 -> {1+4/5}
rule(r"(\d*)\.(\d*)\\overline ?\{(\d+)\}", repeating_decimal)  # 0.1\overline{6} -> {0.10+6/90}
rule(r"\binf(?:inity)?\b", r"\\infty ")  # (0,inf) -> (0,\infty )
rule(r"- ?\\infty", r"\\minfty ")  # -\infty -> \minfty
rule(r"\^ ?\{? ?\\circ ?\}? ?([CF]\b)?", r' "degree\1" ')  # 30^\circ -> 30 "degree"
rule(r"(?<=\d) ?x ?(?=10 ?\^)", "*")  # 2 x 10^3 -> 2*10^3
rule(r"\|([^|]*)\|", r"\\abs(\1)")  # |x| -> \abs(x)
rule(r'"?\bper\b"?', "/")  # 5 m per s -> 5 m / s
UNIT = "|".join(UNITS)
END = r"(?=( ?\^ ?\{?\d\}?)?$)"  # and after a space: 5m is 5 times m
rule(rf"(?<=[\d}})] )({UNIT}) ?/ ?({UNIT}){END}", r'"\1"/"\2"')  # 5 m / s -> 5 "m"/"s"
rule(rf"(?<=[\d}})] )({UNIT}){END}", r'"\1"')  # 5 m -> 5 "m"
rule(r'"?\b(?:square|sq)\b"? ?("?[a-z]+"?)', r"\1^2")  # 5 square cm -> 5 cm^2
rule(r'"?\bcubic\b"? ?("?[a-z]+"?)', r"\1^3")  # 5 cubic cm -> 5 cm^3
rule(r',? ?(?<![\\A-Za-z])"?(?:and|or)"?(?![A-Za-z]) ?', ",")  # 1, 2, and 3 -> 1, 2,3
rule(rf"(?<![\\A-Za-z])({FUNCTIONS}|pi|sqrt)(?![A-Za-z])", r"\\\1 ")  # 2sin(x) -> 2\sin (x)
rule(r"\\sqrt ?(\d+|[a-z])", r"\\sqrt{\1}")  # \sqrt2 -> \sqrt{2}
rule(rf"\\sqrt ?\[(\w+)\] ?(\{{{BRACED}\}}|\w)", r"(\2)^{1/\1}")  # \sqrt[3]{x} -> ({x})^{1/3}
ARGUMENT = rf"\(([^()]*)\)|\{{([^{{}}]*)\}}|((?:[\w.^ ]|\\(?:{GREEK})\b)+)"
# \sin^2 3x -> (\sin{3x})^2
rule(rf"\\({FUNCTIONS}) ?(?:\^ ?\{{?(\d+)\}}?)? ?(?:{ARGUMENT})", function_power)
rule(r"\(([^()\[\]]*)\]", r"\\leftopen{\1}")  # (1,2] -> \leftopen{1,2}
rule(r"\[([^()\[\]]*)\)", r"\\rightopen{\1}")  # [1,2) -> \rightopen{1,2}
rule(r"^\{([^{}]*,[^{}]*)\}$", r"\\{\1\\}")  # {1,2} -> \{1,2\}
rule(r"^\(? ?([A-Z]) ?[).:]?$", r"\1")  # (C) -> C


def tidy(answer):
    """An answer with all rules applied. Single spaces: no pattern can be made to backtrack long."""
    text = " ".join(answer.split())
    for pattern, replacement in RULES:
        if pattern.search(text):
            text = " ".join(pattern.sub(replacement, text).split())
    return text


TOKEN = re.compile(
    r"(?P<name>[A-Za-z]_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\})|[0-9]+_(?:[0-9]+|\{[0-9]+\}))|"
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?!\d))?)|"
    r'(?P<word>"[A-Za-z]+"|[A-Za-z]+)|'
    r"(?P<sign>\\(?:[A-Za-z]+|[{}])|<=|>=|!=|[-+*/^=<>,;!%()\[\]{}])|(?P<other>\S)"
)


def translate(text):
    """Python source for a tidy answer: 2x becomes 2 * x_, and 5 "cm" becomes 5 * _centimeter_."""
    words = []
    for match in TOKEN.finditer(text):
        token, kind = match[0], match.lastgroup
        is_after_factor = bool(words) and words[-1][-1] in "0123456789)]}_"
        if kind == "number":
            spelling = [str(number(Fraction(token)).real)]  # its residue: 0.5 is a long integer
        elif kind == "name":
            spelling = ["v" + re.sub(r"\W", "", token) + "_"]
        elif kind == "word":
            is_after_unit = words[-1:] == ["/"] and words[-2][0] == "_"
            spelling = spell_word(token, is_after_factor or is_after_unit)
        else:
            is_sign = kind == "sign" and (token in PYTHON or token[0] != "\\")
            require(is_sign, "a sign or a command that no answer has")
            spelling = [PYTHON.get(token, token)]

        # Factors side by side are a product; but 4 2 is none, and \frac{1}{2} is a call.
        first = spelling[0][0]
        if is_after_factor and token != "{" and (first in "([{_" or first.isalpha()):
            words.append("*")
        words += spelling
    require(sum(map(words.count, "([{")) <= MAX_BRACKETS, "too many brackets")
    return " ".join(words)


def spell_word(token, is_unit):
    """A run of letters: a word or unit if it is long or quoted, otherwise a product of letters."""
    word = token.strip('"')
    is_short_name = len(word) > 1 and (word in UNITS or word.isupper())
    if len(word) <= 3 and word == token and not is_short_name:
        return " * ".join(f"{letter}_" for letter in word).split()
    if not is_unit:
        return [f"word_{word}_"]

    name = word if word in UNITS else word.lower()
    if len(name) > 3 and name.endswith("s"):
        name = name[:-1]
    require(not re.fullmatch(COMPUTING, name), "a word that computes")
    if name in SCALES:  # 5 million is a number
        return [f"({number(SCALES[name]).real})"]
    return [f"_{UNITS.get(name, name)}_"]


# ---- Evaluation ----

SUMS = (ast.Add, ast.Sub)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATIONS |= {ast.Div: operator.truediv, ast.Pow: power}


def evaluate(node, units):  # noqa: C901  one case for each construct that an answer may have
    """The value of a node of Python's syntax tree. Unless `units` count, each is 1."""
    value = partial(evaluate, units=units)
    match node:
        case ast.Constant(n):
            return Number(n % PRIME)
        case ast.Name("i_" | "infty_" | "minfty_" as name):
            return {"i_": IMAGINARY, "infty_": INFINITY, "minfty_": MINUS_INFINITY}[name]
        case ast.Name(name):
            is_value = name.endswith("_") and name not in ("factorial_", "percent_")
            require(is_value, "a function of nothing")
            return symbol(name) if units or name[0] != "_" else ONE
        case ast.UnaryOp(ast.UAdd(), operand):
            return value(operand)
        case ast.UnaryOp(ast.USub(), operand):
            return MINUS * value(operand)
        case ast.BinOp(operand, ast.Pow(), ast.Name("factorial_" | "percent_" as name)):
            return call_function(name, value(operand))
        case ast.BinOp(left, ast.BitOr(), right):
            return Shape("union", elements(value(left)) | elements(value(right)))
        case ast.BinOp(left, operation, right):
            if isinstance(operation, SUMS) and not units:
                require(not has_units(left) and not has_units(right), "units that do not count")
            return OPERATIONS[type(operation)](value(left), value(right))
        case ast.Call(ast.Call(ast.Name("frac"), [numerator], []), [denominator], []):
            return value(numerator) / value(denominator)
        case ast.Call(ast.Name(name), items, []) if name in SHAPES:
            return Shape(name, tuple(map(value, items)))
        case ast.Call(ast.Name(name), [argument], []) if name in CALLED:
            return call_function(name, value(argument))
        case ast.List([item]):
            return value(item)
        case ast.List([_, _] as items):
            return Shape("[]", tuple(map(value, items)))
        case ast.List(items) | ast.Tuple(items):
            return Shape("()", tuple(map(value, items)))
        case ast.Set(items):
            return Shape("set", frozenset(map(value, items)))
        case ast.Compare(left, signs, others):
            names = [name_of(side) for side in (left, *others)]
            signs = [type(sign).__name__ for sign in signs]
            return relation([value(side) for side in (left, *others)], names, signs)
    raise ValueError("a construct that no answer has")


def has_units(operand):
    """Whether units stand in an operand of a sum; of a sum in it, its own operands are asked."""
    is_sum = isinstance(getattr(operand, "op", None), SUMS)
    return not is_sum and re.search(r"\b_", ast.unparse(operand)) is not None


def name_of(node):
    """What can be said to be a value, as text: x_, or (x_, y_); "" for any other node."""
    source = ast.unparse(node)
    is_name = re.fullmatch(r"(?!pi_)[A-Za-z]\w*_|\([a-z]_(, [a-z]_)*\)", source)
    return source if is_name else ""


INTERVALS = {"Lt Lt": "()", "LtE LtE": "[]", "Lt LtE": "leftopen", "LtE Lt": "rightopen"}


def relation(sides, names, signs):
    """What a chain of relations says: an equation, or what a name is, or in which set it lies."""
    if set(signs) <= {"Gt", "GtE"}:  # read from right to left, the chain ascends
        sides, names, signs = sides[::-1], names[::-1], signs[::-1]
        signs = [sign.replace("G", "L") for sign in signs]
    if signs in (["Lt"], ["LtE"]) and names[0]:  # x < v is -infinity < x < v
        sides, names, signs = [MINUS_INFINITY, *sides], ["", *names], ["Lt", *signs]
    elif signs in (["Lt"], ["LtE"]):
        sides, signs = [*sides, INFINITY], [*signs, "Lt"]
    interval = INTERVALS.get(" ".join(signs))
    if interval and names[1]:
        return Shape("is", Shape(interval, (sides[0], sides[2])), names[1])

    is_equation = set(signs) == {"Eq"} and len(set(sides[1:])) == 1
    require(is_equation or (signs == ["In"] and names[0]), "a chain of different values")
    if names[0]:
        return Shape("is", sides[-1], names[0])
    if names[-1]:
        return Shape("is", sides[0], names[-1])
    return Shape("equation", sides[0] - sides[-1])


def read_answer(answer, units=True):
    """(value, whether it has units) of an answer. Several items are a bare list."""
    text = tidy(answer)
    if ":" in text or re.fullmatch("[A-Za-z\"' .]*[A-Za-z]{2}[A-Za-z\"' .]*", text):
        return Shape("text", re.sub("[\"' ]", "", text.lower())), False  # words, a ratio, a time

    values = []
    for plus, minus in ("+-", "-+"):
        source = translate(text.replace(r"\pm", plus).replace(r"\mp", minus))
        items = ast.parse(f"[{source},]", mode="eval").body.elts
        by_sign = [evaluate(item, units) for item in items]
        values += [value for value in by_sign if plus == "+" or value not in values]
        if r"\pm" not in text and r"\mp" not in text:  # otherwise two values, by either sign
            break

    # x = 1 or x = 2; x = 1, 2: one name is said to be all of them.
    names = {v.name for v in values if v.kind == "is" and values[0].kind == "is"}
    if len(names) == 1:
        values = [unnamed(v) for v in values]
    value = values[0]
    if all(v.kind == "set" for v in values):
        value = Shape("set", frozenset().union(*map(elements, values)))
    elif len(values) > 1:
        value = Shape("list", tuple(sorted(values, key=repr)))
    return Shape("is", value, *names) if len(names) == 1 else value, " _" in source


def elements(value):
    """The set of the values in a set, a union or a bare list; of any other the set of itself."""
    return frozenset(value.items if value.kind in ("set", "union", "list") else [value])


def unnamed(value):
    """The value alone where a name is said to be it."""
    return value.items if value.kind == "is" else value


def difference(equation):
    """Left side minus right side of an equation; x = v is one, too."""
    is_equation = equation.kind == "equation"
    return equation.items if is_equation else symbol(equation.name) - equation.items


def values_equal(a, b):
    """Whether two values are equal by the rules at the head of this part."""
    if {a.kind, b.kind} <= {"is", "equation"} and (a.name != b.name or not a.name):
        ratio = difference(a) / difference(b)
        require(difference(a).fraction() is None, "an equation without a letter")
        return ratio.fraction() is not None  # each is a rational multiple of the other
    a, b = unnamed(a), unnamed(b)
    kinds = {a.kind, b.kind}
    are_sets = "set" in kinds and kinds <= {"set", "list", "number", "()"}
    return a == b or (are_sets and elements(a) == elements(b))


def answers_equal(answer, gold):
    """True, False, or None when undecided (which counts as not equal). Symmetric; never raises."""
    answer, gold = str(answer).strip(), str(gold).strip()
    if not answer or not gold:
        return None
    if answer == gold:
        return True
    try:
        require(max(len(answer), len(gold)) <= MAX_CHARS, "a long text")
        (a, a_has_units), (b, b_has_units) = read_answer(answer), read_answer(gold)
        if a_has_units and not b_has_units:  # units on one side only do not count
            a, _ = read_answer(answer, units=False)
        if b_has_units and not a_has_units:
            b, _ = read_answer(gold, units=False)
        return values_equal(a, b)
    except Exception:
        return None


# ---- Finding the answer in a completion ----

TAIL = 20_000  # characters: the answer stands at the end, and a bounded look takes bounded time
FORMS = {  # \boxed{x}; #### x; the answer is x
    "boxed": rf"\\f?boxed\s*(?=\{{({BRACED})\}})",
    "hash": r"####[ \t]*([^\n]*)",
    "phrase": r"(?im)\banswer(?:\s+is|\s*:)\s*:?([^\n]*?)(?=\.\s|\.?$)",
}
ACCEPTED = ("boxed", "hash", "phrase")  # by the built-in tasks, which ask for the first


def extract_answer(text, how):
    """The last answer in the form `how` (of several: in the first that occurs), or None."""
    for form in [how] if isinstance(how, str) else how:
        matches = re.finditer(FORMS[form], text[-TAIL:])
        answers = [match[1].strip() for match in matches if match[1].strip()]
        if answers:
            return answers[-1].rstrip(",")
    return None


# --------------------------------------------------------------------------------------------------
# 4. Rewards
# A completion earns the numbers of its task's judge and the values of reward functions, which have
# TRL's signature: f(completions, **columns) -> list of numbers, one a completion. They are called
# by keyword. Columns are lists, too: each field of the task's rows (question, answer, ...), prompts
# (the questions), completion_ids, finish ("stop" or "length"); max_new_tokens is one number.


def judge_answer(completion, row):
    """The judge of text: accuracy: the answer equals row["answer"]; answered: there is one, in any
    of the ACCEPTED forms; format: in a box; undecided: the verifier cannot tell."""
    answer = find_answer(completion, row)
    if answer is None:
        return {"accuracy": 0.0, "answered": 0.0, "format": 0.0, "undecided": 0.0}
    equal = answers_equal(answer, row["answer"])
    is_boxed = extract_answer(completion, "boxed") is not None
    numbers = {"accuracy": float(equal is True), "answered": 1.0, "format": float(is_boxed)}
    return numbers | {"undecided": float(equal is None)}


def find_answer(completion, row):
    """The answer in a completion as text, or None."""
    return extract_answer(completion, ACCEPTED)


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
