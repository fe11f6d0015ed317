"""Tasks, answer checking and rewards: everything Reasoning Palette knows about what a right answer is.

Three parts, in reading order:
  1. the tiny world: a made-up language of 132 words with two problem families and three answer styles, small enough to
     pretrain a model on in a minute and a half, and built so that a *strategy* (the style) decides whether an answer is right;
  2. tasks: rows {question, answer}, how a question becomes a prompt, how a completion is judged;
  3. the verifier: answer extraction and exact equality.

Departs from the paper: the paper trains on DeepMath-103K and tests on MATH500, GSM8K, ...; those are reached through
`--task math` and `--task gsm8k` here, and the tiny world is ours. No torch in this file: it can be read, and used, alone.

Run it:
    python rewards.py                                   # show the tiny world: one question of each family in every style
    python rewards.py --check '\\frac{1}{2}' 0.5          # is this answer equal to that one?
    python rewards.py --task gsm8k --data test=PATH.jsonl    # show a task's first prompt and check its own answers
"""
import argparse
import json
import random
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
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
    Without them control by one prefix row (L = 1) is lost (measured; see README).
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
        """Rewards by name for one completion (text without special tokens).

        Returns {"accuracy": 0.0 or 1.0, "answered": 0.0 or 1.0}: not giving an answer in the asked form is told apart
        from giving a wrong one. finish: "stop" or "length".
        """
        answer = None if self.needs_stop and finish != "stop" else extract_answer(completion, self.answer_from)
        correct = answer is not None and answers_equal(answer, gold) is True
        return {"accuracy": float(correct), "answered": float(answer is not None)}


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


def load_task(name, train=None, test=None, seed=0):
    """The task called `name`: "tiny"; "gsm8k" or "math" (the paper's); any other name for your own rows.

    train, test: where the rows come from: a JSONL file of {question, answer}, or "hub:DATASET:CONFIG:SPLIT". gsm8k and
    math have hub sets as defaults. A split without a source stays empty. Raises ValueError naming what is missing.
    """
    if name == "tiny":
        if train or test:
            raise ValueError("the task 'tiny' makes its own questions: drop --train-data/--test-data, or choose another --task")
        return tiny_task(seed=seed)
    sources = HUB_SETS.get(name, {}) if not (train or test) else {}
    train, test = train or sources.get("train"), test or sources.get("test")
    if not (train or test):
        raise ValueError(f"the task '{name}' has no data of its own: give --train-data and --test-data a JSONL of "
                         f"{{question, answer}} (tasks with data: tiny, {', '.join(HUB_SETS)})")
    return Task(name, load_rows(train) if train else [], load_rows(test) if test else [], instruction=BOXED)


def load_rows(source):
    """Rows {question, answer} from a JSONL file or from "hub:DATASET[:CONFIG[:SPLIT]]".

    Hub sets name the fields differently; the first present of question/problem/prompt/query and of final_answer/answer is
    taken, and of a GSM8K answer what follows ####. Raises ValueError naming file and line, or the data set.
    """
    if source.startswith("hub:"):
        from datasets import load_dataset           # only here: a local run needs neither the package nor a network
        dataset, config, split = (source[4:].split(":") + ["", ""])[:3]
        rows = [(f"{source}, row {i}", dict(row)) for i, row in enumerate(load_dataset(dataset, config or None, split=split or "train"))]
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no such file: {source} (expected JSONL rows of {{question, answer}})")
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    rows.append((f"{source}, line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{source}, line {number}: not JSON ({error.msg}); one object a line is expected") from None
    rows = [_row(where, raw) for where, raw in rows]
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


def extract_answer(text, how):
    for rule in how:
        if rule == "tiny":
            m = re.search(r"(?:so|thus|print|return|is|=) (\d(?: \d)*)$", text.strip())
            if m: return m.group(1)
        if rule == "boxed":
            m = re.findall(r"boxed\{([^{}]*)\}", text)
            if m: return m[-1]
    return None


def answers_equal(a, b):
    return a.replace(",", "").strip() == b.replace(",", "").strip()
