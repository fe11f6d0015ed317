"""The tiny world: a made-up language of 131 words, a small Qwen3 pretrained on it, and its task.

This is `--model tiny` and `--task tiny`: the embedded default of every script, and the worked
example of a task file that brings its own model. Two problem families, three answer styles. Every
style is right in the training text, but writes down more or less of the work: so a *strategy* (the
style) decides whether an answer is right, and without context the good strategies are rare.

Departs from the paper, which has no such thing: it trains real models on DeepMath-103K (here:
`--task math`). The tiny world is ours, small enough to pretrain in a minute and a half. Its text is
words alone, as that of a real base model: no vector that a VAE decodes is in it.

Run it:
    python tutorials/tiny_world.py --show          # one question of each family in every style
    python tutorials/tiny_world.py                 # pretrain the base into runs/tiny/base
    python tutorials/tiny_world.py --out runs/tiny-1/base --seed 1 --steps 300
"""

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prefix import text_model
from rewards import prompt_ids
from sft import Ranks, Run, apply_gradients, seed_of
from vae import Reader, parse_settings, require_at_least, result_settings, run_main, write_text

# ------------------------------------------------------------------------------------------------
# 1. Questions, and answers in three styles
#
# A question is arithmetic modulo 10 ("calc 7 + 2 - 3 + 1 - 2 ?") or a list changed by four
# operations ("take list 3 1 4 do rev inc rot dec ?").
#   math   works arithmetic step by step, but answers lists in one hop
#   code   works lists step by step, but does most of the arithmetic in one hop
#   qa     answers both in one hop
# A small transformer learns the written-out steps perfectly and the hops hardly at all.

STYLES = ("math", "code", "qa")
FAMILIES = ("arith", "list")
LIST_OPERATIONS = ("rev", "rot", "inc", "dec")  # reverse, rotate, add 1 to each, take 1 off each

STEP_WORDS = ("step", "first", "then", "next")
CALL_WORDS = ("run", "exec", "call")
STYLE_WORDS = {
    "math": [*STEP_WORDS, "=", "so", "thus", "we"],
    "code": [*CALL_WORDS, "x", ":=", ";", "print", "return"],
    "qa": ["i", "think", "guess", "answer", "probably", "maybe", "is", "simply"],
}
OPENINGS = {"math": STEP_WORDS, "code": ("x", *CALL_WORDS), "qa": ("i",)}  # an answer's first word


@dataclass(frozen=True)
class Question:
    """family: "arith" or "list". text: what is asked. operations: four texts, "+ 2" or "rev".
    states: the value before the first and after every operation, five texts, "7" or "3 1 4"."""

    family: str
    text: str
    operations: tuple
    states: tuple

    @property
    def answer(self):
        """The gold answer as text: one digit, or three digits separated by spaces."""
        return self.states[-1]


def make_question(rng, family=None):
    """Draw a Question. rng: random.Random; family: "arith", "list" or None for either."""
    if family is None:
        family = rng.choice(FAMILIES)
    if family == "arith":
        return _make_arithmetic(rng)
    return _make_list(rng)


def _make_arithmetic(rng):
    value = rng.randrange(10)
    operations = []
    states = [str(value)]
    for _ in range(4):
        sign = rng.choice("+-")
        amount = rng.randint(1, 3)
        value = (value + int(f"{sign}{amount}")) % 10
        operations.append(f"{sign} {amount}")
        states.append(str(value))
    text = f"calc {states[0]} {' '.join(operations)} ?"
    return Question("arith", text, tuple(operations), tuple(states))


def _make_list(rng):
    digits = [rng.randrange(10) for _ in range(3)]
    states = [_spell(digits)]
    operations = [rng.choice(LIST_OPERATIONS) for _ in range(4)]
    for operation in operations:
        if operation == "rev":
            digits = digits[::-1]
        elif operation == "rot":
            digits = digits[1:] + digits[:1]
        elif operation == "inc":
            digits = [(digit + 1) % 10 for digit in digits]
        else:
            digits = [(digit - 1) % 10 for digit in digits]
        states.append(_spell(digits))
    text = f"take list {states[0]} do {' '.join(operations)} ?"
    return Question("list", text, tuple(operations), tuple(states))


def _spell(digits):
    return " ".join(map(str, digits))


def write_answer(rng, question, style):
    """A right answer to a Question in one style: text of at most 33 words, without end token."""
    if style == "qa":
        parts = _straight_to_the_answer(rng)
    elif style == "math" and question.family == "arith":
        parts = _one_line_per_operation(rng, question)
    elif style == "math":
        parts = _list_in_one_hop(rng, question)
    elif question.family == "list":
        parts = _one_call_per_operation(rng, question)
    else:
        parts = _one_call_then_a_hop(rng, question)
    return " ".join([*parts, question.answer])


def _straight_to_the_answer(rng):
    verb = rng.choice(("think", "guess"))
    noun = rng.choice(("answer", "simply"))
    hedge = rng.choice(("probably", "maybe"))
    return ["i", verb, noun, hedge, "is"]


def _one_line_per_operation(rng, question):
    parts = []
    for i, operation in enumerate(question.operations):
        before = question.states[i]
        after = question.states[i + 1]
        parts += [rng.choice(STEP_WORDS), "we", before, operation, "=", after]
    return [*parts, rng.choice(("so", "thus"))]


def _list_in_one_hop(rng, question):
    parts = [rng.choice(STEP_WORDS), "we", question.states[0]]
    parts += [rng.choice(STEP_WORDS), "we", *question.operations, "=", question.answer]
    return [*parts, rng.choice(("so", "thus")), "we", "="]


def _one_call_per_operation(rng, question):
    parts = []
    for operation, after in zip(question.operations, question.states[1:]):
        parts += [rng.choice(CALL_WORDS), operation, ":=", after, ";"]
    return [*parts, rng.choice(("print", "return"))]


def _one_call_then_a_hop(rng, question):
    parts = ["x", ":=", question.states[0], question.operations[0], ";"]
    parts += [rng.choice(CALL_WORDS), "x", ":=", question.states[1], ";"]
    parts += [rng.choice(CALL_WORDS), "x", *question.operations[1:], ";"]
    return [*parts, rng.choice(("print", "return"))]


def style(completion):
    """The style that a completion is written in: the one most of its style words belong to, the
    first of equals; "none" without any."""
    words = completion.split()
    best = "none"
    most = 0
    for name in STYLES:
        count = sum(word in STYLE_WORDS[name] for word in words)
        if count > most:
            best = name
            most = count
    return best


def make_trace(rng, style):
    """One trace {question, answer, domain}, its domain the style."""
    question = make_question(rng)
    answer = write_answer(rng, question, style)
    return {"question": question.text, "answer": answer, "domain": style}


def make_traces(n, seed):
    """n traces, the domains (styles) in turn: the corpus of the VAE and of the SFT warm-up."""
    rng = random.Random(f"tiny traces {seed}")
    return [make_trace(rng, STYLES[i % len(STYLES)]) for i in range(n)]


# ------------------------------------------------------------------------------------------------
# 2. The task: what every script asks of a task file (see rewards.py)

DOMAINS = STYLES
TEST_QUESTIONS, TRAIN_QUESTIONS = 512, 4096
ANSWER_FORM = re.compile(r"(?:so|thus|print|return|is|=) ([0-9](?: [0-9])*)\s*$")

# Settings that fit this world: its weights bear far larger steps than a real model's.
DEFAULTS = {
    "schedule": ["none", "two-phase", "linear"],
    "lr": 4e-4,
    "warm_up": "posterior",
    "sft": {
        "prior": {"lr": 3e-6, "tokens_per_batch": 1024},
        # shorter prefixes are too close to none: their styles leak into answers without prefix
        "posterior": {"lr": 2e-4, "lengths": [4, 8], "tokens_per_batch": 1024},
    },
    "steps": 60,
    "max_new_tokens": 34,
    "eval_questions": 256,
    "closing_questions": 64,
    "tokens_per_batch": 1024,
    "base_steps": 900,
}


def load(split, seed=0):
    """Rows {question, answer, family} of "train" (4,096) or "test" (512): distinct questions, both
    families in turn, no test question among the training ones."""
    rng = random.Random(f"tiny task {seed}")
    questions = {}  # text -> Question: the first of equals
    while len(questions) < TEST_QUESTIONS + TRAIN_QUESTIONS:
        question = make_question(rng, FAMILIES[len(questions) % 2])
        questions.setdefault(question.text, question)

    rows = []
    for question in questions.values():
        row = {"question": question.text, "answer": question.answer, "family": question.family}
        rows.append(row)
    if split == "test":
        return rows[:TEST_QUESTIONS]
    return rows[TEST_QUESTIONS:]


def answer(completion, row):
    """The digits that end a completion, as text, or None. A completion that was cut off by the
    length limit has no answer."""
    if row["finish"] == "length":
        return None
    match = ANSWER_FORM.search(completion)
    if match is None:
        return None
    return match[1]


def judge(completion, row):
    """Each 0.0 or 1.0. Answers are compared letter by letter: a digit more is wrong. What is found
    is in the form that was asked for, and nothing is ever undecided."""
    digits = answer(completion, row)
    is_right = digits == row["answer"]
    is_answered = digits is not None
    return {
        "accuracy": float(is_right),
        "answered": float(is_answered),
        "format": float(is_answered),
        "undecided": 0.0,
    }


# ------------------------------------------------------------------------------------------------
# 3. The pretraining text
#
# "Topical" documents carry context of one style; "chat" documents carry none, or random words, and
# are answered in qa style but for CHAT_LEAK of each other style: how rare a strategy is without
# its context.

PAD, END, QUESTION, ANSWER = "<pad>", "<end>", "<q>", "<a>"
QUESTION_WORDS = ["?", "calc", "take", "list", "do", "+", "-", "rev", "rot", "inc", "dec"]
DIGITS = list("0123456789")
NEUTRAL_TEXT = """
    hello please ok well dear today user chat hi good day yes sure also and the a an of to in on for
    with by from at as be was are were has had you he she they them his her our your my me us can
    could would should will may might must do did done go went see saw make made take took time year
    people way man woman child world life hand part place week case point home water room mother
"""
NEUTRAL_WORDS = NEUTRAL_TEXT.split()


def list_words(*groups):
    """All words of the groups in order, each once."""
    words = []
    for group in groups:
        words += group
    return list(dict.fromkeys(words))


CONTENT_WORDS = list_words(QUESTION_WORDS, DIGITS, *STYLE_WORDS.values(), NEUTRAL_WORDS)
VOCABULARY = [PAD, END, QUESTION, ANSWER, *CONTENT_WORDS]

CHAT_SHARE = 0.4  # of all documents
CHAT_LEAK = 1e-4
RANDOM_CHAT_SHARE = 0.25  # of chat documents: any words of the world in front, not neutral ones
TITLE_SHARE = 0.7  # of topical documents; the others begin with a cut-off answer
# More of what each style does well, so that its skill comes sooner: shares of arith and list.
FAMILY_SHARES = {"math": (2, 1), "code": (1, 2), "qa": (1, 1)}


@dataclass(frozen=True)
class World:
    """What pretraining documents are made of. styles: their names; topic_shares, chat_shares:
    how often each comes with and without context; style_words: the words that mark a style;
    content_words: all words with a meaning; make_trace(rng, style) -> {question, answer, ...}."""

    styles: tuple
    topic_shares: tuple
    chat_shares: tuple
    style_words: dict
    content_words: list
    make_trace: Callable


TINY_WORLD = World(
    styles=STYLES,
    topic_shares=(0.4, 0.4, 0.2),
    chat_shares=(CHAT_LEAK, CHAT_LEAK, 1 - 2 * CHAT_LEAK),
    style_words=STYLE_WORDS,
    content_words=CONTENT_WORDS,
    make_trace=make_trace,
)


@dataclass
class Document:
    """A pretraining document. The first n_title of its words are a title. image: the picture that
    its question is about, where the world has pictures."""

    style: str
    words: list
    n_title: int = 0
    image: object = None


def document_opening(rng, world):
    """How a document begins: a title, a cut-off answer, or nothing. Returns a Document."""
    if rng.random() < CHAT_SHARE:
        return _chat_opening(rng, world)
    style = rng.choices(world.styles, world.topic_shares)[0]
    if rng.random() < TITLE_SHARE:
        return _titled_opening(rng, world, style)

    # cut inside an answer: the style can be read off what is left
    answer_words = world.make_trace(rng, style)["answer"].split()
    cut = rng.randrange(len(answer_words) - 1)
    return Document(style, [*answer_words[cut:], END])


def _chat_opening(rng, world):
    style = rng.choices(world.styles, world.chat_shares)[0]
    pool = NEUTRAL_WORDS
    if rng.random() < RANDOM_CHAT_SHARE:
        pool = world.content_words
    n_title = rng.choice([0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    return Document(style, rng.choices(pool, k=n_title), n_title)


def _titled_opening(rng, world, style):
    words = _title_words(rng, world, style, rng.randint(1, 8))
    n_neutral = rng.choice((0, 0, 1, 2, 3, 4))
    words = [*words, *rng.choices(NEUTRAL_WORDS, k=n_neutral)][:8]
    rng.shuffle(words)
    return Document(style, words, n_title=len(words))


def _title_words(rng, world, style, n):
    """n words of one trace of the style, at least one of them a style word."""
    trace = world.make_trace(rng, style)
    pool = trace["question"].split() + trace["answer"].split()
    style_words = world.style_words[style]
    words = [rng.choice(pool) for _ in range(n)]
    if not set(words) & set(style_words):
        style_word = rng.choice([word for word in pool if word in style_words])
        words[rng.randrange(n)] = style_word
    return words


def make_document(rng, length):
    """A Document of `length` words: an opening, then questions and answers in its style."""
    document = document_opening(rng, TINY_WORLD)
    words = document.words
    while len(words) < length:
        family = rng.choices(FAMILIES, FAMILY_SHARES[document.style])[0]
        question = make_question(rng, family)
        answer_words = write_answer(rng, question, document.style).split()
        words += [QUESTION, *question.text.split(), ANSWER, *answer_words, END]
    document.words = words[:length]
    return document


# ------------------------------------------------------------------------------------------------
# 4. The model and its pretraining

CHAT_TEMPLATE = "{% for m in messages %}<q> {{ m['content'] }} <a>{% endfor %}"
MUON_LR, ADAMW_LR = 0.01, 3e-3


def make_tokenizer(vocabulary=VOCABULARY):
    """A word-level Hugging Face tokenizer, with a chat template "<q> question <a>". An unknown word
    is read as a pad, the words <|...|> need no spaces around them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    word_ids = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(word_ids, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [word for word in vocabulary if word.startswith("<|")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,
        additional_special_tokens=special,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_reader():
    """What turns text into this model's input: a vae.Reader without an image processor."""
    return Reader(make_tokenizer())


def make_model(seed=0):
    """A Qwen3 of 2 layers, width 128 and 0.4M weights, untrained. Init 0.08, our choice: at 0.02
    learning starts late."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(END),
        pad_token_id=VOCABULARY.index(PAD),
    )
    return Qwen3ForCausalLM(config)


@dataclass
class Batch:
    """ids [B, T]; embeddings [B, T, d], what the model reads; weights [B, T], 1 where the word is
    to be predicted; positions [3, B, T], rotary ones, or None where they are the columns."""

    ids: torch.Tensor
    embeddings: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor | None = None


def embed_documents(documents, model, tokenizer):
    """Documents as a Batch. Weights are 0 in titles, pads and inside questions, which hold nothing
    to learn; that a question begins is learnt."""
    word_ids = tokenizer.get_vocab()
    longest = max(len(document.words) for document in documents)
    ids = []
    for document in documents:
        pads = [PAD] * (longest - len(document.words))
        ids.append([word_ids[word] for word in document.words + pads])
    ids = torch.tensor(ids)  # [B, T]

    opens_question = ids == word_ids[QUESTION]
    opens_answer = ids == word_ids[ANSWER]
    is_pad = ids == word_ids[PAD]
    is_inside = opens_question.cumsum(1) > opens_answer.cumsum(1)  # from <q> to the word before <a>
    is_nothing_to_learn = (is_inside & ~opens_question) | opens_answer | is_pad
    weights = (~is_nothing_to_learn).float()  # [B, T]
    for row, document in enumerate(documents):
        weights[row, : document.n_title] = 0

    embeddings = model.get_input_embeddings()(ids)  # [B, T, d]
    return Batch(ids, embeddings, weights)


def make_batch(config, step, model, tokenizer):
    """The documents of one step, a pure function of the seed and the step."""
    rng = random.Random(seed_of(config.seed, "document", step))
    documents = [make_document(rng, config.length) for _ in range(config.batch)]
    return embed_documents(documents, model, tokenizer)


def make_optimizers(model):
    """Muon for the hidden matrices, AdamW for the rest, both from torch.optim: AdamW alone needs
    more steps."""
    matrices = []
    others = []
    for name, parameter in model.named_parameters():
        is_hidden = ".layers." in name or "visual." in name
        if is_hidden and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    muon = torch.optim.Muon(matrices, MUON_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.01)
    return [muon, adamw]


def set_learning_rates(muon, adamw, step, steps):
    """Up over 30 steps, flat, then down from 40% of the steps on, to 3% of the peak."""
    warm = (step + 1) / 30
    cool = 0.03 + 1.6 * (1 - step / steps)
    factor = min(1.0, warm, cool)
    muon.param_groups[0]["lr"] = MUON_LR * factor
    adamw.param_groups[0]["lr"] = ADAMW_LR * factor


def next_word_loss(model, batch):
    """Cross-entropy of every word given the words before it, a mean over the words that count."""
    text = text_model(model)
    output = text(inputs_embeds=batch.embeddings, position_ids=batch.positions, use_cache=False)
    logits = model.get_output_embeddings()(output.last_hidden_state)[:, :-1]  # [B, T - 1, V]
    targets = batch.ids[:, 1:].flatten()  # [B (T - 1)]
    weights = batch.weights[:, 1:]  # [B, T - 1]
    losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def pretrain(run, model, make_batch, steps, save_every):
    """The loop of both worlds, from the run's newest checkpoint on. make_batch(step) -> Batch."""
    muon, adamw = make_optimizers(model)
    start = run.restore(model, [muon, adamw])
    bar = tqdm(range(start, steps), "pretraining the tiny base", total=steps, initial=start)
    for step in bar:
        set_learning_rates(muon, adamw, step, steps)
        loss = next_word_loss(model, make_batch(step))
        loss.backward()
        norm = apply_gradients(model, [muon, adamw], run.ranks)
        run.log("metrics", {"step": step + 1, "loss": loss.item(), "gradient_norm": norm})
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % save_every == 0 and step + 1 < steps:
            run.save(step + 1, model, [muon, adamw])


@torch.no_grad()
def style_leak(model, tokenizer):
    """{style: mean probability of its opening words} where an answer to arithmetic begins, without
    any context. How rare the good strategies are decides what exploration can gain, so it is
    measured and printed, not assumed."""
    questions = [row["question"] for row in load("test") if row["family"] == "arith"]
    prompts = [prompt_ids(question, tokenizer) for question in questions]
    logits = model(input_ids=torch.tensor(prompts)).logits[:, -1]  # [N, V], prompts of one length
    probabilities = logits.softmax(-1).mean(0)  # [V]
    leak = {}
    for name in STYLES:
        openings = tokenizer.convert_tokens_to_ids(sorted(OPENINGS[name]))
        leak[name] = probabilities[openings].sum().item()
    return leak


def finish_base(run, model, reader, traces, leak, steps, target):
    """Print and log what the style leak is (target: what it was trained at), then write
    traces.jsonl and policy/, which completes the run."""
    shares = []
    metrics = {}
    for name, share in leak.items():
        shares.append(f"{name} {share:.3%}")
        metrics[f"leak_{name}"] = share
    print(f"without context an answer opens in style {', '.join(shares)} (trained at {target})")
    run.log("metrics", {"step": steps, **metrics})
    lines = [json.dumps(trace) + "\n" for trace in traces]
    write_text(run.folder / "traces.jsonl", "".join(lines))
    run.finish(model.eval(), reader)


def make_base(config):
    """Make the base model in config.out: policy/ (a Hugging Face folder) and traces.jsonl. A
    finished one of the same settings is left alone, others are refused (ValueError)."""
    settings = {"world": "tiny", **result_settings(config)}
    run = Run(config.out, settings, Ranks.alone(), config.resume, config.overwrite)
    if run.finished:
        return run
    model, reader = make_model(config.seed), make_reader()

    def batch_of_step(step):
        return make_batch(config, step, model, reader.tokenizer)

    pretrain(run, model, batch_of_step, config.steps, config.save_every)
    leak = style_leak(model, reader.tokenizer)
    target = f"{CHAT_LEAK:.2%} for math and code"
    finish_base(run, model, reader, make_traces(3000, config.seed), leak, config.steps, target)
    return run


def make_policy(folder, seed=0, steps=None):
    """What grpo.py and the others call where the base is missing; resumes an unfinished one."""
    if steps is None:
        steps = DEFAULTS["base_steps"]
    make_base(TinyWorldConfig(out=str(folder), seed=seed, steps=steps, resume=True))


def finish(folder):
    """What grpo.py calls at its end: make the page of this run. Returns the line that names it."""
    import explore  # late: it imports this file

    try:
        page = explore.make_page(explore.ExploreConfig(run=str(folder)))
    except ValueError as error:  # a run with its VAE elsewhere, say: no reason to fail at the end
        return f"no page of the palette: {error}"
    return f"the palette, to open in a browser: {page}"


# ------------------------------------------------------------------------------------------------
# 5. Command line


@dataclass
class TinyWorldConfig:
    """Settings of the tiny base; its run is a pure function of those with compare=True."""

    out: str = HfArg(default="runs/tiny/base", help="run folder", compare=False)
    seed: int = HfArg(default=0, help="seed of everything random")
    steps: int = HfArg(default=900, help="updates")
    batch: int = HfArg(default=32, help="documents per update")
    length: int = HfArg(default=80, help="words of a document")
    save_every: int = HfArg(default=100, help="steps between checkpoints", compare=False)
    resume: bool = HfArg(default=False, help="go on with an unfinished run", compare=False)
    overwrite: bool = HfArg(default=False, help="replace a run of other settings", compare=False)
    show: bool = HfArg(default=False, help="print examples, train nothing", compare=False)

    def __post_init__(self):
        require_at_least(self, steps=1, batch=1, length=8, save_every=1)  # titles have up to 8


def show_examples(seed):
    """Print a question of each family, and its answer in every style."""
    rng = random.Random(seed)
    for family in FAMILIES:
        question = make_question(rng, family)
        print(f"question  {question.text}    gold answer  {question.answer}")
        for name in STYLES:
            print(f"  {name:5}   {write_answer(rng, question, name)}")


def main(argv=None):
    """Make the base, or show what the world looks like."""
    config = parse_settings(TinyWorldConfig, __doc__, argv)
    if config.show:
        show_examples(config.seed)
        return
    run = make_base(config)
    print(f"the tiny base is in {run.folder}/policy")


if __name__ == "__main__":
    run_main(main, "tiny_world.py")
