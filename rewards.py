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
"""
import argparse
import json
import random
import re
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import factorial, gcd, isqrt
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


def _title_words(rng, style, n):
    """n words of one trace of the style, digits and question words among them, at least one of them a style word."""
    question = tiny_question(rng)
    trace = question.text.split() + tiny_answer(rng, question, style).split()
    words = [rng.choice(trace) for _ in range(n)]
    if not set(words) & set(STYLE_WORDS[style]):
        words[rng.randrange(n)] = rng.choice([word for word in trace if word in STYLE_WORDS[style]])
    return words


def tiny_document(rng, length):
    """One pretraining document: a title (or a cut-off answer), then questions and answers in one style.

    Returns (words, n_title, soft): `length` words, of which the first n_title are the title; soft maps a title position to
    the bag of words whose *mean embedding* stands there instead of the word's own. Soft titles are this world's stand-in
    for the varied text a real base model has read: they let it read an average of words, which is what a VAE decodes.
    Our choice, and close to training on what the VAE decodes: README says what it means for the results.
    """
    soft, bag = {}, None
    if rng.random() < CHAT_SHARE:
        style = rng.choices(STYLES, (CHAT_LEAK, CHAT_LEAK, 1 - 2 * CHAT_LEAK))[0]
        pool = CONTENT_WORDS if rng.random() < RANDOM_CHAT_SHARE else NEUTRAL_WORDS
        words = rng.choices(pool, k=rng.choice([0] * 8 + list(range(1, 9))))
        bag = lambda: rng.choices(pool, k=rng.randint(2, 8))
    else:
        style = rng.choices(STYLES, TOPIC_SHARES)[0]
        if rng.random() < TITLE_SHARE:
            words = _title_words(rng, style, rng.randint(1, 8)) + rng.choices(NEUTRAL_WORDS, k=rng.choice((0, 0, 1, 2, 3, 4)))
            words = words[:8]
            rng.shuffle(words)
            bag = lambda: _title_words(rng, style, rng.randint(3, 16))
        else:                                   # cut inside an answer: the style can be read off what is left
            answer = tiny_answer(rng, tiny_question(rng), style).split()
            words = answer[rng.randrange(len(answer) - 1):] + [END]
    n_title = len(words) if bag else 0
    if n_title and rng.random() < SOFT_SHARE:
        tiled = bag() if rng.random() < 0.5 else None       # one bag for all title rows, or one each
        soft = {i: tiled or bag() for i in range(n_title)}
    while len(words) < length:
        question = tiny_question(rng, rng.choices(FAMILIES, FAMILY_SHARES[style])[0])
        words += [QUESTION, *question.text.split(), ANSWER, *tiny_answer(rng, question, style).split(), END]
    return words[:length], n_title, soft

# ------------------------------------------------------------------------------------------------------------------------
# 2. Tasks


@dataclass
class Task:
    """Questions with gold answers, and how a completion is judged.

    train, test: lists of rows {question, answer}. instruction: what follows the question in the prompt. answer_from:
    the extraction rules tried in order. needs_stop: a completion cut off by the length limit has no answer. style: names
    the strategy of a completion, where the task can tell.
    """
    name: str
    train: list
    test: list
    instruction: str = ""
    answer_from: tuple = ("boxed", "hash", "phrase")
    needs_stop: bool = False
    style: Callable | None = None

    def judge(self, completion, gold, finish="stop"):
        """What one completion (text without special tokens) earns, by name, each 0.0 or 1.0. finish: "stop" or "length".

        accuracy: its answer equals the gold one. answered: there is an answer in one of the accepted forms. format: in the
        form that was asked for, the first of them. undecided: the verifier cannot tell; that counts as wrong.
        """
        cut_off = self.needs_stop and finish != "stop"
        answer = None if cut_off else extract_answer(completion, self.answer_from)
        equal = None if answer is None else answers_equal(answer, gold)
        return {"accuracy": float(equal is True), "answered": float(answer is not None),
                "format": float(not cut_off and extract_answer(completion, self.answer_from[0]) is not None),
                "undecided": float(answer is not None and equal is None)}


def tiny_task(n_train=4096, n_test=512, seed=0):
    """The tiny world as a task: distinct questions, both families in turn, no test question among the training ones."""
    rng, seen, rows = random.Random(f"tiny task {seed}"), set(), []
    while len(rows) < n_train + n_test:
        question = tiny_question(rng, FAMILIES[len(rows) % 2])
        if question.text not in seen:
            seen.add(question.text)
            rows.append({"question": question.text, "answer": question.answer, "family": question.family})
    return Task("tiny", rows[n_test:], rows[:n_test], answer_from=("tiny",), needs_stop=True, style=tiny_style)


BOXED = "\nReason step by step, and put the final answer within \\boxed{}."
HUB_SETS = {"gsm8k": {"train": "hub:openai/gsm8k:main:train", "test": "hub:openai/gsm8k:main:test"},
            "math": {"train": "hub:zwhe99/DeepMath-103K::train", "test": "hub:HuggingFaceH4/MATH-500::test"}}


def load_task(name, train=None, test=None, splits=("train", "test"), seed=0):
    """The task called `name`: "tiny"; "gsm8k" or "math" (the paper's); any other name for your own rows.

    train, test: where the rows come from: a JSONL file of {question, answer}, or "hub:DATASET:CONFIG:SPLIT". gsm8k and
    math have hub sets as defaults. Only the named splits are loaded. Raises ValueError naming what is missing.
    """
    if name == "tiny":
        if train or test:
            raise ValueError("the task 'tiny' makes its own questions: drop --train-data/--test-data, or choose another --task")
        return tiny_task(seed=seed)
    sources = {**HUB_SETS.get(name, {}), **({"train": train} if train else {}), **({"test": test} if test else {})}
    for split in splits:
        if split not in sources:
            raise ValueError(f"the task '{name}' has no {split} rows of its own: give --{split}-data a JSONL of "
                             f"{{question, answer}} (tasks with data: tiny, {', '.join(HUB_SETS)})")
    return Task(name, **{split: load_rows(sources[split]) if split in splits else [] for split in ("train", "test")},
                instruction=BOXED)


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
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no such file: {source} (expected JSONL rows of {{question, answer}})")
        rows = []
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):      # splitlines would cut at U+2028 in a string
            if line.strip():
                try:
                    raw = json.loads(line)
                except ValueError as error:                                 # not JSON, or not UTF-8
                    raise ValueError(f"{source}, line {number}: not JSON ({error}); one object a line is expected") from None
                rows.append(_row(f"{source}, line {number}", raw))
    if not rows:
        raise ValueError(f"{source}: no rows in it; expected JSONL rows of {{question, answer}}")
    return rows


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

MAX_CHARS, MAX_DEPTH, MAX_BITS, MAX_WORK = 1000, 25, 20_000, 2000     # beyond any of them an answer is undecided
_work = threading.local()                                             # what one check may still spend, per thread


class Undecided(Exception):
    """The answer lies outside the language, or would cost more than one check may spend."""


def require(condition, why):
    if not condition:
        raise Undecided(why)


def spend(units):
    """Take `units`, about 5 microseconds each, from what this thread's check may cost."""
    _work.left -= units
    require(_work.left >= 0, "too much work")


# ---- Exact numbers: a frozenset of (radicand, Fraction). Any other value is a tuple that starts with its kind. ----
def number(value, radicand=1):
    return frozenset({(radicand, Fraction(value))} if value else ())


@lru_cache(maxsize=4096)
def symbol(name, point):
    """What a letter, a unit or an unexpanded function stands for at `point` (0 or 1): about 1e8, of either sign."""
    draw = random.Random(f"{point} {name}").randrange(10 ** 13, 10 ** 14)
    return number(Fraction((-1) ** point * draw, 999_983))


def rational(p):
    """The Fraction that p is, or None for an irrational number."""
    return sum(c for _, c in p) if p <= number(sum(c for _, c in p)) else None


def add(p, q, sign=1):
    """p + sign * q. Undecided for values that are not numbers (an interval, a list)."""
    require(isinstance(p, frozenset) and isinstance(q, frozenset), "arithmetic on a structure")
    spend(len(p) // 4)
    out = dict(p)
    for n, c in q:
        out[n] = out.get(n, 0) + sign * c
    return frozenset((n, c) for n, c in out.items() if c)


def mul(p, q):
    """p * q, by sqrt(m) sqrt(n) = g sqrt(mn/g^2) with g = gcd(m, n), and minus that where both are negative."""
    require(isinstance(p, frozenset) and isinstance(q, frozenset), "arithmetic on a structure")
    out = {}
    for m, a in p:
        for n, b in q:
            g = gcd(m, n)
            c = a * b * (-g if m < 0 and n < 0 else g)
            spend(1 + ((c.numerator.bit_length() + c.denominator.bit_length()) // 1400) ** 2 + m.bit_length() // 500)
            out[m * n // g ** 2] = out.get(m * n // g ** 2, 0) + c
    return frozenset((n, c) for n, c in out.items() if c)


def inverse(p):
    """1/p, its denominator made rational by conjugation: one prime (or -1) at a time changes the sign of its root."""
    top, p = number(1), add(p, number(0))
    while irrational := [n for n, _ in p if n != 1]:
        n = irrational[0]
        prime = -1 if n < 0 else next((f for f in range(2, 1000) if n % f == 0), n)
        conjugate = frozenset((k, -c if (k < 0 if prime == -1 else k % prime == 0) else c) for k, c in p)
        top, p = mul(top, conjugate), mul(p, conjugate)
    require(p, "division by zero")
    return mul(top, number(1 / rational(p)))


def power(p, exponent, point):
    """p ** exponent: exact for a rational exponent with a small denominator, otherwise a symbol."""
    r = rational(add(exponent, number(0)))
    if r is None or r.denominator > 9:
        return symbol(f"power {sorted(add(p, number(0)))} {sorted(exponent)}", point)
    bits = max((max(abs(c.numerator), c.denominator).bit_length() for _, c in p), default=1)
    require(p or r > 0, "zero to the zero")
    require(bits * abs(r) <= MAX_BITS and (len(p) < 2 or abs(r) < 100), "huge power")
    out, n, base = number(1), abs(r.numerator), p if r > 0 else inverse(p)
    while n:
        out, base, n = mul(out, base) if n % 2 else out, mul(base, base) if n > 1 else base, n // 2
    return root(out, r.denominator, point) if r.denominator > 1 else out


def root(p, n, point):
    """The real n-th root of p, i times it for the square root of a negative number; symbols where p is irrational."""
    c = rational(p)
    if not c:
        return p if c == 0 else symbol(f"root {n} {sorted(p)}", point)
    if c < 0:
        require(n % 2 or n == 2, "complex root")
        return mul(root(number(-c), n, point), number(1, -1) if n == 2 else number(-1))
    rest, out = c.numerator * c.denominator ** (n - 1), 1
    for f in range(2, 1000):
        while rest % f ** n == 0:
            rest, out = rest // f ** n, out * f
        if f ** n > rest:
            break
    if n == 2:
        whole = isqrt(rest) if isqrt(rest) ** 2 == rest else 1
        return number(Fraction(out * whole, c.denominator), rest // whole ** 2)
    return mul(number(Fraction(out, c.denominator)), number(1) if rest == 1 else symbol(f"root {n} {rest}", point))


# ---- Reading: CLEAN removes what only decorates, lex() makes tokens, Reader a value ----
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp".split())
GREEK = set("pi alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi rho sigma tau phi chi psi omega".split())
MORE = GREEK | FUNCTIONS | {"sqrt", "frac"}         # commands that may follow a factor: 2\\pi
SCALES = dict(percent=Fraction(1, 100), dozen=12, hundred=100, thousand=1000, million=10**6, billion=10**9)
UNITS = set("per cm mm km kg mg ml mL ft in yd mi lb oz hr min sec mph deg day cup men".split())     # the short ones
COMPUTING = set("half halves third quarter squared cubed factorial plus minus times over modulo less more choose below "
                "under negative inverse percentage divided root".split())
ALIASES = dict(pair.split("=") for pair in (
    "inche=in inch=in feet=ft foot=ft usd=dollar sec=s second=s hr=h hour=h deg=degree minute=min meter=m mile=mi "
    "centimeter=cm kilometer=km gram=g kilogram=kg pound=lb liter=l").split())
SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "≤": "<=", "≥": ">=", "≠": "!=", "²": "^2 ", "³": "^3 ",
    "½": " \\frac12 ",
    "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ", "°": "^\\circ ", "∪": "\\cup ", "±": "\\pm ", "∈": "\\in "})
COMMANDS = dict.fromkeys("left right big Big bigl bigr displaystyle boxed mathbf mathbb quad qquad".split(), " ")
COMMANDS |= dict(pair.split("@") for pair in (
    r"dfrac@\frac tfrac@\frac cfrac@\frac cdot@* times@* div@/ le@<= leq@<= ge@>= geq@>= ne@!= neq@!= "
    r"lt@< gt@> approx@= vert@| lvert@| rvert@| lbrace@\{ rbrace@\} langle@( rangle@) degree@^\circ").split())
CLEAN = [(re.compile(pattern), new) for pattern, new in (
    (r"\\\$|^\$(?=[^$]*$)", "¤"),
    (r"\$|`|^\*\*|\*\*$|^\s*\\[(\[]|\\[)\]]\s*$", " "), (r"\*\*", "^"),  # money, delimiters
    (r"\\(?:text|mbox|textbf|textit|textrm|mathrm)\s*\{([^{}]*)\}", lambda m: quoted(m[1])),
    # 1\frac45 becomes 1 4/5; 1{,}234 becomes 1234; 5 m is 5 metres but 5m is 5 times m; f(x) = 2 becomes f_x = 2
    (r"(?<![\d.^_A-Za-z])(\d+)\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", r"\1 \2\3/\4\5"),
    (r"\\\\\s*\\end\b", r"\\end"), (r"\\(begin|end)\s*\{[pb]matrix\}", r"\\\1 "), (r"\\%", "%"),
    (r"\\([A-Za-z]+)\*?", lambda m: COMMANDS.get(m[1], m[0])),
    (r"(?<=\d)(?:,\\!|\{,\}|\\,)\s*(?=\d{3})", ""), (r"(?<!\\)\\[,;:!> ]|~", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?\s*([CF]\b)?", r' "degree\1" '), (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),
    (r"(?<![\\A-Za-z])inf(?:inity)?\b", r"\\infty "), (r"(?<![\\A-Za-z])in(?=\s*[\[({\\])", r"\\in "),
    (r"(?<=[\d})])\s+([smghLNJWV])((?:\^\{?\d\}?)?\s*)$", r' "\1"\2'),
    (r"(?<=[\d})])\s+([ck]?m|mi|ft)\s*/\s*(s|h|hr|min|sec)\s*$", r' "\1"/"\2"'),
    (r"(?<=[a-z]{3})-(?=[a-z]{3})", " "), (r",?\s*(?<![\\A-Za-z])\"?(?:and|or)\"?(?![A-Za-z])\s*", ","),
    (r"^([A-Za-z])\(([A-Za-z])\)(?=\s*=)", r"\1_\2"), (r"^\s*=|(?<!\.)\.\s*$", ""),
    (r"^\s*\(?\s*([A-Z])\s*[).:]?\s*$", r"\1"))]
LEX = re.compile(
    r'(?P<number>[0-9]+\s+[0-9]+/[0-9]+|[0-9]+_(?:[0-9]+|\{[0-9]+\})|'
    r'(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:\\overline\{[0-9]+\})?(?:[eE][+-]?[0-9]+)?)|'
    r'(?P<symbol>[A-Za-z]_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))|(?P<word>"[A-Za-z]+"|[A-Za-z]+)|'
    r'(?P<sign>\s+|\\(?:[A-Za-z]+|[{}\\])|<=|>=|!=|[-+*/^_=<>(){}\[\],;:|!%&¤£€])')
THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])(?:\.[0-9]+)?")


def quoted(content):
    """The words of a \\text{...}, each in quotes so that lex() keeps it whole; choices, e and i stay letters."""
    letter = re.fullmatch(r"\s*\(?[A-Zei]\)?\.?\s*", content)
    return content if letter else re.sub("[A-Za-z]+", r' "\g<0>" ', content)


def lex(text):
    """The tokens: numbers and signs as written, symbols as letters, commands with a backslash, words after a quote."""
    tokens, at, depth = [], 0, 0
    while at < len(text):
        m = THOUSANDS.match(text, at)
        m = m if m and (not depth or ",0" in m[0]) else LEX.match(text, at)     # in brackets a comma separates
        require(m, "a character no answer has")
        at, token, name = m.end(), m[0].strip(), m[0].lower()
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if m.lastgroup != "word":
            tokens += [re.sub("[{}]", "", token) if m.lastgroup == "symbol" else token] if token else []
        elif name in FUNCTIONS or name in ("pi", "sqrt"):
            tokens.append("\\" + name)
        else:                                 # longer letter runs are words, and AB is no product; xy is one
            whole = token[0] == '"' or token in UNITS or len(token) > 3 or len(token) > 1 and token.isupper()
            tokens += ['"' + token.strip('"')] if whole else token
    return tokens


def literal(token):
    """The Fraction that a number token denotes: 1,234.5, 1.2e5, 1 4/5, 0.1\\overline{6}, 204_5."""
    if token.isdigit():
        return Fraction(int(token))
    digits, _, base = re.sub("[,{}]", "", token).partition("_")
    if base:
        return Fraction(int(digits, int(base)))
    if "/" in digits:
        whole, part = map(Fraction, digits.split())
        require(part < 1, "a product or a mixed number?")
        return whole + part
    digits, _, period = digits.partition("\\overline")
    require(abs(int(digits.lower().partition("e")[2] or 0)) < 2000, "huge exponent")
    repeated = Fraction(int(period), 10 ** len(period) - 1) if period else Fraction(0)
    return Fraction(digits) + repeated / 10 ** len(digits.partition(".")[2])


class Reader:
    """Recursive descent over the tokens of one answer. `sign` is what plus-minus means, `point` what symbols stand for,
    `units` whether units do (otherwise they are 1); `seen` collects which of plus-minus and units occurred."""

    def __init__(self, tokens, sign, point, units):
        self.tokens, self.at, self.depth, self.seen = tokens, 0, 0, set()
        self.sign, self.point, self.units = sign, point, units

    def peek(self, ahead=0):
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else " "

    def take(self, *wanted):
        """The next token if it is among `wanted` (any, where none are named), else ''."""
        found = self.peek()
        self.at += (taken := not wanted or found in wanted)
        return found if taken else ""

    def items(self, closing, separators=(",", ";")):
        """Items up to a closing token: (items, all separators with the closing token)."""
        found, seen = [self.item()], ""
        while separator := self.take(*separators):
            found, seen = found + [self.item()], seen + separator
        require(self.peek() in closing, "another token was due")
        return found, seen + self.take()

    def item(self):
        """Unions or ratios of sums, or a chain of relations between them: x = v, a < x <= b, x in S."""
        sides, names, relations = [], [], []
        while not sides or self.peek() in ("=", "<", ">", "<=", ">=", "!=", "\\in"):
            relations += [self.take()] if sides else []
            start, joined = self.at, [self.sum()]
            while self.take("\\cup"):
                joined.append(self.sum())
            sides.append(("union", frozenset(joined)) if len(joined) > 1 else joined[0])
            name = "".join(self.tokens[start:self.at])
            bare = self.at == start + 1 and re.fullmatch(r'"?[A-Za-z]\w*|\\(?!pi|infty)[a-z]+', name)
            names.append(name if bare or re.fullmatch(r"\([a-z](,[a-z])*\)", name) else "")
        return relation(sides, names, relations) if relations else sides[0]

    def sum(self):
        """Terms with signs between them. Infinity stands alone, with at most a sign: it obeys no arithmetic."""
        if self.peek() == "\\infty" or self.peek(1) == "\\infty" and self.peek() in "+-":
            sign = self.take("-", "+")
            return "infinity", "-" if self.take("\\infty") and sign == "-" else ""
        value = None
        while value is None or self.peek() in ("+", "-", "\\pm", "\\mp"):
            sign = 1
            while op := self.take("+", "-", "\\pm", "\\mp"):
                self.seen |= {"\\pm"} if op in ("\\pm", "\\mp") else set()
                sign *= {"+": 1, "-": -1, "\\pm": self.sign, "\\mp": -self.sign}[op]
            term = self.term()
            require(value is None or self.units or "unit" not in self.seen, "a sum whose units do not count")
            value = term if value is None and sign > 0 else add(value or number(0), term, sign)
        return value

    def term(self):
        """Factors joined by *, / or nothing; nothing may not stand before a number, so that 4 2 is no product."""
        value = self.factor()
        while True:
            token = self.peek()
            if token in ("*", "/", '"per') and self.take():
                other = self.factor(after=True)
                value = mul(value, other if token == "*" else inverse(other))
            elif token[0] in '("¤£€' or token[0].isalpha() or token == "{" and not self.peek(1)[0].isdigit() or (
                    token[0] == "\\" and token[1:] in MORE):
                value = mul(value, self.factor(after=True))
            else:
                return value

    def factor(self, after=False):
        """An atom with powers, factorials and percents. `after` another factor a word may be a scale (5 million)."""
        self.depth += 1
        require(self.depth <= MAX_DEPTH, "too deep")
        sign = -1 if self.take("-") else 1
        value = self.atom(after)
        while token := self.take("^", "!", "%"):
            if token == "^":
                value = power(value, self.factor(), self.point)
            else:
                value = mul(value, number(Fraction(1, 100))) if token == "%" else self.function("!", value)
                require(token != self.peek(), "a double factorial or percent")
        self.depth -= 1
        return value if sign > 0 else mul(number(-1), value)

    def atom(self, after):
        """A number, letter, word, bracket, fraction, root, function, matrix or absolute value."""
        token = self.take()
        if token[0] in ".0123456789":
            return ("base", re.sub("[{}]", "", token), literal(token)) if "_" in token else number(literal(token))
        if token in ("(", "[", "{", "\\{", "\\begin"):
            return self.bracket(token)
        if token[0] == '"' or token in "¤£€":
            unit = self.unit(token.strip('"'), after)
            return mul(unit, self.factor()) if token in "¤£€" and not after else unit
        if token == "|":
            value = self.sum()
            require(self.take("|"), "unbalanced bars")
            return self.function("abs", value)
        if token == "\\frac":
            sides = []
            while len(sides) < 2:
                if (digits := self.peek()).isdigit():         # of bare digits TeX takes one: \\frac12
                    self.tokens[self.at:self.at + 1] = [digits[0]] + [digits[1:]] * (len(digits) > 1)
                sides.append(self.atom(False))
            return mul(sides[0], inverse(sides[1]))
        if token == "\\sqrt":
            n = literal(self.take()) if self.take("[") else Fraction(2)
            self.take("]")
            return power(self.atom(False), number(1 / n), self.point)
        if token[1:] in FUNCTIONS:
            n = self.factor() if self.take("^") else number(1)
            value = self.atom(False) if self.peek() in ("(", "{", "[") else self.factor()
            while self.peek()[0].isalnum() or self.peek() == "\\pi":
                value = mul(value, self.factor())
            require(n != number(-1), "an inverse or a reciprocal?")
            return power(self.function(token[1:], value), n, self.point)
        require(token[-1].isalnum() and (token[0] != "\\" or token[1:] in GREEK), "an unknown token")
        return number(1, -1) if token == "i" else symbol(token.strip("\\"), self.point)

    def function(self, name, value):
        """A function where its value is rational, otherwise the symbol that its name and argument stand for."""
        exact = rational(add(value, number(0)))
        if name == "abs" and exact is not None:
            return number(abs(exact))
        if name == "!" and exact is not None and exact.denominator == 1 and 0 <= exact <= 2100:
            return number(factorial(int(exact)))
        if name == "exp":
            return power(symbol("e", self.point), value, self.point)
        return symbol(f"{name} {sorted(value)}", self.point)

    def unit(self, name, after):
        """A scale after a number (5 million), otherwise a unit (5 cm, 3 square feet, 18 eggs, $5)."""
        name = name if len(name) == 1 else name.lower()
        single = name[:-1] if len(name) > 3 and name[-1] == "s" else name
        if single in SCALES and after:
            return number(SCALES[single])
        computes = {name, single} & COMPUTING or single.endswith(("th", "illion")) and single != "month"
        require(not computes and single not in SCALES, "a word that computes")
        require(self.units or after or name in "¤£€" or self.peek() == "=", "a unit that belongs to no number")
        if name in ("square", "sq", "cubic") and self.peek()[0] == '"':
            return power(self.factor(after=True), number(3 if name == "cubic" else 2), self.point)
        self.seen.add("unit")
        name = "dollar" if name == "¤" else ALIASES.get(name, ALIASES.get(single, single))
        return symbol("unit " + name, self.point) if self.units else number(1)

    def bracket(self, opening):
        """A group, interval, tuple, set or matrix. A singleton in matching brackets, unless a set, is its element."""
        closing = {"{": ["}"], "\\{": ["\\}"], "\\begin": ["\\end"]}.get(opening, (")", "]"))
        found, seen = self.items(closing, ("&", "\\\\") if opening == "\\begin" else (",", ";"))
        if opening == "\\begin":
            return "matrix" + seen, tuple(found)
        if opening == "\\{" or opening == "{" and len(found) > 1:
            return "set", frozenset(found)
        if len(found) == 1:
            require(opening + seen in ("()", "[]", "{}"), "unbalanced brackets")
            return found[0]
        return opening + seen[-1] if len(found) == 2 else "()", tuple(found)


def relation(sides, names, relations):
    """("is", name, value) from x = v, v = x, x in S, a < x <= b; ("zero", "", left - right) from any other equation."""
    if set(relations) == {"="}:
        require(len(set(sides[1:])) == 1, "a chain of different values")
        if names[0] or names[-1]:
            return ("is", names[0], sides[-1]) if names[0] else ("is", names[-1], sides[0])
        return "zero", "", add(sides[0], sides[-1], -1)
    if relations in (["\\in"], ["!="]) and names[0]:
        return "is", names[0], sides[1] if relations == ["\\in"] else ("not", sides[1])
    if set(relations) <= {">", ">="}:
        sides, names, relations = sides[::-1], names[::-1], [r.replace(">", "<") for r in relations[::-1]]
    require(set(relations) <= {"<", "<="}, "mixed relations")
    if len(relations) == 1 and names[0]:                    # x < v is -infinity < x < v
        sides, names, relations = [("infinity", "-")] + sides, [""] + names, ["<"] + relations
    elif len(relations) == 1:
        sides, relations = sides + [("infinity", "")], relations + ["<"]
    require(len(relations) == 2 and names[1], "an inequality that is not solved for a symbol")
    brackets = ("(" if relations[0] == "<" else "[") + (")" if relations[1] == "<" else "]")
    return "is", names[1], (brackets, (sides[0], sides[2]))


def parse(text):
    """Tokens, or the lower-case words of an answer that is nothing but words. Undecided outside the language."""
    require(len(text) <= MAX_CHARS, "too long")
    text = " ".join(text.translate(SIGNS).split())
    for pattern, new in CLEAN:
        text = " ".join(pattern.sub(new, text).split())      # single spaces: no pattern can be made to backtrack long
    runs = re.findall("[A-Za-z]+", text.lower())
    if re.fullmatch("[A-Za-z\"' .]+", text) and any(len(w) > 1 and w not in FUNCTIONS | {"pi", "sqrt"} for w in runs):
        return " ".join(runs)
    return text.replace(" ", "") if ":" in text else lex(text)          # a ratio or a time of day, as written


def kind(value):
    return value[0] if isinstance(value, tuple) else "number"


def value_of(tokens, point, units):
    """(value, whether units occur) of tokens at a point. Several items are a bare list; plus-minus makes two values."""
    if isinstance(tokens, str):
        return ("text", tokens), False
    found = []
    for sign in (1, -1):
        reader = Reader(list(tokens), sign, point, units)
        found += [v for v in reader.items((" ",))[0] if sign > 0 or v not in found]
        if "\\pm" not in reader.seen:
            break
    wrap = kind(found[0]) == "is" and all(kind(v) != "is" or v[1] == found[0][1] for v in found)    # x = 1 or x = 2
    items = [v[2] if wrap and kind(v) == "is" else v for v in found]
    if all(kind(v) == "set" for v in items):
        value = "set", frozenset().union(*(v[1] for v in items))
    else:
        value = items[0] if len(items) == 1 else ("list", frozenset(Counter(items).items()))
    return ("is", found[0][1], value) if wrap else value, "unit" in reader.seen


def same(a, b):
    """Whether two values, each at one point, are equal by the rules at the head of this file."""
    kinds = {kind(a), kind(b)}
    if a == b or kinds == {"is"} and a[1] == b[1]:
        return a == b or same(a[2], b[2])
    if "is" in kinds and len(kinds) == 2:
        return same(a[2], b) if kind(a) == "is" else same(a, b[2])
    if "set" in kinds and kinds <= {"set", "list", "number", "()"}:
        a, b = (v[1] if kind(v) == "set" else {x for x, _ in v[1]} if kind(v) == "list" else {v} for v in (a, b))
    return a == b


def answers_equal(answer, gold):
    """True, False, or None when undecided (callers count it and treat it as not equal). Symmetric; never raises."""
    answer, gold = str(answer).strip(), str(gold).strip()
    if not answer or not gold or answer == gold:
        return (answer == gold) if answer and gold else None
    _work.left, ratios = MAX_WORK, []
    try:
        tokens = parse(answer), parse(gold)
        for point in (0, 1):
            read = [value_of(t, point, True) for t in tokens]
            if read[0][1] != read[1][1]:             # units on one side only: they do not count
                read = [value_of(t, point, False) for t in tokens]
            (a, _), (b, _) = read
            kinds = {kind(a), kind(b)}
            if "zero" in kinds and kinds <= {"is", "zero"} or kinds == {"is"} and a[1] != b[1]:
                p, q = (v[2] if v[0] == "zero" else add(symbol(v[1].strip('\\"'), point), v[2], -1) for v in (a, b))
                ratios.append(mul(p, inverse(q)))    # equations agree where one is a constant multiple of the other
            elif not same(a, b):
                return False
        return len(set(ratios)) <= 1 and number(0) not in ratios
    except (Undecided, ValueError, ArithmeticError, RecursionError):
        return None


# ---- Finding the answer in a completion ----
TAIL = 20_000       # characters: the answer stands at the end of a completion, and a bounded look takes bounded time
ASKED = {"boxed": r"\\f?boxed\s*\{", "hash": r"####[ \t]*([^\n]*)",
         "phrase": r"(?i)\banswer(?:\s+is|\s*:)\s*:?(?=([^\n]*))",
         "tag": r"<answer>((?:(?!</?answer>)[\s\S])*)</answer>",
         "tiny": r"(?:so|thus|print|return|is|=) ([0-9](?: [0-9])*)\s*$",
         "last": r"((?:(?<![\w)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+|\\?%)?)"}


def extract_answer(text, how):
    """The last answer in `text` in the form `how`: "boxed", "hash" (#### x), "phrase" (the answer is x), "tag"
    (<answer>x</answer>) or "last" (number); of several forms the first that occurs. None: there is no answer."""
    text = text[-TAIL:]
    for form in (how,) if isinstance(how, str) else how:
        matches = list(re.finditer(ASKED[form], text))
        if form == "boxed":
            found = [balanced(text[m.end():m.end() + MAX_CHARS]) for m in matches[-20:]]
        else:
            found = [re.split(r"\.(?:\s|$)", m[1])[0] if form == "phrase" else m[1] for m in matches]
        if found := [f.strip().rstrip(",") for f in found if f.strip()]:
            return found[-1]
    return None


def balanced(text):
    """What stands before the brace that closes a group already open, or ''."""
    depth = 1
    for m in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if not depth:
            return text[:m.start()]
    return ""


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


COORDINATE = r"(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)"
BOX = re.compile(r"(?:<box>|box_start\|>|[\[({])[\s\[(]{0,9}"
                 + r"[\s,()\[\]]{1,9}".join([COORDINATE] * 4) + r"[\s\])]{0,9}(?:</box>|<\|box_end|[\])}])")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs=2, metavar=("ANSWER", "GOLD"), help="are these two answers equal?")
    parser.add_argument("--task", default="tiny", help="show a task: tiny, gsm8k, math, or a name for --data (default: tiny)")
    parser.add_argument("--data", help="its test rows: JSONL of {question, answer} or hub:DATASET:CONFIG:SPLIT (default: its own)")
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
