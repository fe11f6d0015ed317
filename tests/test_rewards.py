"""rewards.py, but for the verifier: worlds, task files, rows, prompts and reward functions."""

import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import rewards
from rewards import (
    Reward,
    Task,
    find_model,
    load_file,
    load_rewards,
    load_rows,
    load_task,
    overlong,
    prompt_ids,
    score_rewards,
    stop_strings,
    weighted_sum,
    world_defaults,
    world_domains,
    world_of,
    world_root,
    world_traces,
)

ROOT = Path(__file__).resolve().parent.parent


def write(folder, name, text):
    """A file with this text, less its common indent; its path."""
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(path)


REVERSE = """
    DOMAINS = ("loud", "quiet")
    INSTRUCTION = " Backwards, please."

    def load(split, seed=0):
        words = ["pot", "god"] if split == "train" else ["bat"]
        return [{"question": word, "answer": word[::-1], "seed": seed} for word in words]

    def judge(completion, row):
        if row["finish"] == "length":
            return {"accuracy": 0}
        right = completion.strip().lower() == row["answer"]
        return {"accuracy": right, "letters": len(completion)}

    def answer(completion, row):
        return completion.strip() or None

    def style(completion):
        return "loud" if completion.isupper() else "quiet"
"""


@pytest.fixture
def reverse(tmp_path):
    """A task file that uses the whole protocol."""
    return write(tmp_path, "reverse.py", REVERSE)


# ---- task files ----


def test_a_task_file_is_all_that_a_task_needs(reverse):
    task = load_task(reverse, seed=7)
    assert task.name == "reverse" and task.instruction == " Backwards, please."
    assert [row["question"] for row in task.train] == ["pot", "god"]
    assert task.test == [{"question": "bat", "answer": "tab", "seed": 7}]
    assert task.styles == ("loud", "quiet") and task.style("TAB") == "loud"
    assert task.extract(" tab ", task.test[0]) == "tab"
    assert task.extract(" ", task.test[0]) is None
    assert not task.is_grounding


def test_the_judge_gives_floats_by_the_same_names_every_time(reverse):
    task = load_task(reverse, splits=("test",))
    row = task.test[0]
    assert task.reward_names == ("accuracy", "letters")
    assert task.judge("Tab", row) == {"accuracy": 1.0, "letters": 3.0}
    assert task.judge("Tab", row, finish="length") == {"accuracy": 0.0, "letters": 0.0}
    assert all(type(value) is float for value in task.judge("Tab", row).values())


def test_names_that_only_a_right_answer_shows_are_learnt_too(tmp_path):
    file = """
        def load(split, seed=0):
            return [{"question": "1 + 1", "answer": "2"}]

        def judge(completion, row):
            if not completion:
                return {"accuracy": 0}
            return {"accuracy": completion == row["answer"], "brevity": 1 / len(completion)}
    """
    task = load_task(write(tmp_path, "brief.py", file))
    assert task.judge("", task.test[0]) == {"accuracy": 0.0, "brevity": 0.0}


def test_names_that_come_only_later_are_dropped(tmp_path):
    file = """
        def load(split, seed=0):
            return [{"question": "1 + 1", "answer": "2"}]

        def judge(completion, row):
            if completion == "surprise":
                return {"accuracy": 0, "novelty": 1}
            return {"accuracy": 0}
    """
    task = load_task(write(tmp_path, "novel.py", file))
    assert task.judge("surprise", task.test[0]) == {"accuracy": 0.0}


def test_a_task_file_without_a_judge_is_judged_by_the_verifier(tmp_path):
    file = """
        def load(split, seed=0):
            return [{"question": "1 / 2", "answer": "0.5"}]
    """
    task = load_task(write(tmp_path, "halves.py", file))
    right = {"accuracy": 1.0, "answered": 1.0, "format": 1.0, "undecided": 0.0}
    assert task.instruction == rewards.BOXED
    assert task.judge("\\boxed{\\frac{1}{2}}", task.test[0]) == right
    assert task.extract("The answer is 3.", task.test[0]) == "3"
    assert task.style("The answer is 3.") is None and task.styles == ()


def test_a_judge_of_its_own_needs_no_answers(tmp_path):
    file = """
        def load(split, seed=0):
            return [{"question": "write a haiku"}]

        def judge(completion, row):
            return {"accuracy": completion.count("\\n") == 2}
    """
    task = load_task(write(tmp_path, "haiku.py", file))
    assert task.instruction == "" and task.test[0]["answer"] == ""
    assert task.judge("a\nb\nc", task.test[0]) == {"accuracy": 1.0}


def test_a_judge_of_overlap_in_pictures_makes_a_grounding_task(tmp_path):
    file = """
        def load(split, seed=0):
            return [{"question": "where?", "answer": "[0, 0, 1, 1]", "image": "a.png"}]

        def judge(completion, row):
            return {"accuracy": 0, "iou": 0.25}
    """
    assert load_task(write(tmp_path, "where.py", file)).is_grounding
    without = file.replace(', "image": "a.png"', "")  # there is no picture to draw boxes in
    assert not load_task(write(tmp_path, "when.py", without)).is_grounding


LOAD = "def load(split, seed=0):\n    return "
ROW = "[{'question': 'q', 'answer': 'a'}]\n"
JUDGE = "def judge(completion, row):\n    return "


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", r"bad.py is no task: it has no function load"),
        ("def load(:\n", r"the file .*bad.py fails: SyntaxError: .*line 1"),
        ("import no_such_module\n", "bad.py fails: ModuleNotFoundError: .*no_such_module"),
        ("1 / 0\n", r"bad.py fails: ZeroDivisionError: .*\(bad.py, line 1\)"),
        (LOAD + "[]\n", r"load\('train'\) of .*bad.py must return a list of rows, not \[\]"),
        (LOAD + "None\n", "must return a list of rows, not None"),
        (LOAD + "open('nowhere.txt')\n", "fails: FileNotFoundError: .*bad.py, line 2"),
        ("def load(split):\n    return " + ROW, "fails: TypeError: .*seed"),
        (LOAD + "[3]\n", "row 0 has no 'question' with text"),
        (LOAD + "[{'answer': '1'}]\n", "row 0 has no 'question' with text"),
        (LOAD + "[{'question': ' ', 'answer': '1'}]\n", "row 0 has no 'question' with text"),
        (LOAD + "[{'question': 'q'}]\n", r"row 0 has no 'answer', and there is no judge\(\)"),
        (LOAD + ROW + JUDGE + "1.0\n", "question 'q', must return a dict .* not 1.0"),
        (LOAD + ROW + JUDGE + "None\n", "must return a dict with an 'accuracy', not None"),
        (LOAD + ROW + JUDGE + "{'score': 1}\n", "must return a dict with an 'accuracy'"),
        (LOAD + ROW + JUDGE + "{'accuracy': '1'}\n", "numbers: its 'accuracy' is '1'"),
        (LOAD + ROW + JUDGE + "{'accuracy': None}\n", "numbers: its 'accuracy' is None"),
        (LOAD + ROW + JUDGE + "{'accuracy': float('nan')}\n", "'accuracy' is nan"),
        (LOAD + ROW + JUDGE + "{'accuracy': row['gold']}\n", "fails: KeyError: 'gold' .*line 4"),
    ],
)
def test_a_task_file_that_cannot_work_is_refused_in_one_sentence(tmp_path, text, message):
    path = write(tmp_path, "bad.py", text)
    with pytest.raises(ValueError, match=message) as error:
        load_task(path)
    assert "\n" not in str(error.value)


def test_a_judge_that_goes_wrong_later_names_the_question(tmp_path):
    file = """
        def load(split, seed=0):
            return [{"question": "which one?", "answer": "a"}]

        def judge(completion, row):
            if completion == "nothing":
                return {}
            if completion == "text":
                return {"accuracy": "1"}
            if completion == "zero":
                return {"accuracy": 1 / 0}
            return {"accuracy": 1}
    """
    task = load_task(write(tmp_path, "late.py", file))
    for completion in ("nothing", "text", "zero"):
        with pytest.raises(ValueError, match=r"'late', at the question 'which one\?'"):
            task.judge(completion, task.test[0])


def test_missing_files_and_foreign_rows_are_refused(reverse):
    with pytest.raises(ValueError, match="no such file: nowhere/task.py"):
        load_task("nowhere/task.py")
    with pytest.raises(ValueError, match="makes its own questions"):
        load_task(reverse, train="rows.jsonl")
    with pytest.raises(ValueError, match="makes its own questions"):
        load_task("tiny", test="rows.jsonl")


def test_a_file_is_loaded_once_and_files_beside_it_can_be_imported(tmp_path):
    write(tmp_path, "palindromes_helper.py", "WORD = 'level'\n")
    path = write(tmp_path, "palindromes.py", "from palindromes_helper import WORD\n")
    module = load_file(path)
    assert module.WORD == "level" and load_file(path) is module
    assert sys.modules["palindromes"] is module


def test_a_file_never_takes_the_name_of_another_module(tmp_path):
    for name in ("json.py", "rewards.py", "wave.py"):
        module = load_file(write(tmp_path, name, "MINE = True\n"))
        assert module.MINE
        assert sys.modules.get(module.__name__) is module
        assert not hasattr(__import__(name[:-3]), "MINE")


def test_two_files_of_the_same_name_are_two_modules(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "same_stem.py", f"NAME = '{name}'\n")
    one = load_file(tmp_path / "one" / "same_stem.py")
    two = load_file(tmp_path / "two" / "same_stem.py")
    assert (one.NAME, two.NAME) == ("one", "two")
    assert load_file(tmp_path / "two" / "same_stem.py") is two


def test_a_broken_file_can_be_mended(tmp_path):
    path = write(tmp_path, "mended.py", "1 / 0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_file(path)
    write(tmp_path, "mended.py", "FIXED_AT_LAST = True\n")
    assert load_file(path).FIXED_AT_LAST


# ---- worlds ----

WORLD = """
    from pathlib import Path

    DEFAULTS = {"steps": 3}
    DOMAINS = ("a", "b")

    def load(split, seed=0):
        return [{"question": "q", "answer": "a"}]

    def make_policy(folder, seed=0, steps=None):
        policy = Path(folder, "policy")
        policy.mkdir(parents=True)
        (policy / "config.json").write_text("{}")
"""


def test_a_file_with_make_policy_is_a_world(tmp_path, reverse):
    path = write(tmp_path, "my_world.py", WORLD)
    assert world_of(path).DEFAULTS == {"steps": 3}
    assert world_root(path) == "runs/my_world"
    assert world_traces(path) == ["runs/my_world/base/traces.jsonl"]
    assert world_defaults(path) == {"steps": 3}
    assert world_domains(path) == ("a", "b")
    for name in (reverse, "Qwen/Qwen3-0.6B", "runs/tiny/sft"):
        assert world_of(name) is None
        assert world_defaults(name) == {} and world_domains(name) == ()
    assert world_root("tiny") == "runs/tiny" and world_root("tiny-vl") == "runs/tiny-vl"


def test_a_worlds_base_is_made_once_and_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "lazy_world.py", WORLD)
    assert find_model(path) == "runs/lazy_world/base/policy"
    assert (tmp_path / "runs/lazy_world/base/policy/config.json").is_file()
    assert "making runs/lazy_world/base with make_policy of" in capsys.readouterr().out
    assert find_model(path) == "runs/lazy_world/base/policy"  # make_policy would fail: it exists
    assert capsys.readouterr().out == ""


def test_a_run_folder_stands_for_its_policy_and_other_names_for_themselves(tmp_path, reverse):
    (tmp_path / "policy").mkdir()
    assert find_model(str(tmp_path)) == str(tmp_path)
    write(tmp_path / "policy", "config.json", "{}")
    assert find_model(str(tmp_path)) == str(tmp_path / "policy")
    assert find_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    with pytest.raises(ValueError, match="brings no model"):
        find_model(reverse)


def test_the_short_names_are_files_with_all_that_a_world_needs():
    for name in rewards.WORLDS:
        world = world_of(name)
        for function in ("load", "judge", "answer", "style", "make_policy", "make_reader"):
            assert callable(getattr(world, function)), (name, function)
        assert len(world_domains(name)) == 3 and world_defaults(name)
        assert load_task(name, splits=("test",)).styles == world_domains(name)


def test_rewards_is_read_without_torch():
    code = "import sys, rewards; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- rows ----


def test_rows_of_gsm8k_and_of_maths_sets(tmp_path):
    lines = [
        json.dumps({"question": " q #### ", "answer": "work\n#### 1,200"}),
        "",
        json.dumps({"problem": "p", "solution": "s", "final_answer": 7}),
    ]
    path = write(tmp_path, "rows.jsonl", "\n".join(lines) + "\n")
    assert load_rows(path) == [
        {"question": "q ####", "answer": "1,200"},
        {"question": "p", "answer": "7"},
    ]


def test_unicode_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"question": "a\u2028b", "answer": "1"}\n')
    assert load_rows(path) == [{"question": "a\u2028b", "answer": "1"}]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"question": "q", "answer": "1"}\nnonsense\n', "line 2: not JSON"),
        ('{"question": "q"}\n', "line 1: no 'answer'"),
        ('{"question": "", "answer": "1"}\n', "line 1: no 'question'"),
        ("3\n", "line 1: no 'question'"),
        ("", "no rows"),
    ],
)
def test_malformed_rows_name_file_and_line(tmp_path, content, message):
    path = write(tmp_path, "rows.jsonl", content)
    with pytest.raises(ValueError, match=message) as error:
        load_task("mine", test=path, splits=("test",))
    assert "rows.jsonl" in str(error.value)


def test_tasks_without_data_say_what_is_missing():
    with pytest.raises(ValueError, match="no train rows of its own.*question, answer"):
        load_task("mine")
    with pytest.raises(ValueError, match="no such file: nowhere.jsonl"):
        load_task("mine", train="nowhere.jsonl", test="x")
    with pytest.raises(ValueError, match="no train rows of its own.*bbox"):
        load_task("refcoco", test="x.jsonl")
    with pytest.raises(ValueError, match="unknown unit"):
        load_task("refcoco:7", test="x.jsonl")


class HubSet(list):
    """A list of rows that has what rewards.py asks of a datasets.Dataset."""

    @property
    def column_names(self):
        return list(self[0])

    def cast_column(self, name, feature):
        assert (name, feature) == ("image", "undecoded")
        return self


def test_hub_sets_are_named_by_set_configuration_and_split(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return HubSet([{"problem": "p", "answer": "1", "solution": "long"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_rows("hub:a/b") == [{"question": "p", "answer": "1"}]
    task = load_task("gsm8k")
    assert calls[0] == ("a/b", None, "train")
    assert calls[1:] == [("openai/gsm8k", "main", split) for split in ("train", "test")]
    assert task.train == task.test == [{"question": "p", "answer": "1"}]
    load_task("math")
    assert calls[3] == ("zwhe99/DeepMath-103K", None, "train")
    assert calls[4] == ("HuggingFaceH4/MATH-500", None, "test")


def test_a_hub_set_of_boxes_has_a_row_for_each_expression(monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (100, 50)).save(buffer, "PNG")
    png = buffer.getvalue()
    row = {"image": {"bytes": png}, "bbox": [10, 20, 30, 5], "answer": ["cat", "pet"]}

    def load_dataset(name, config, split):
        return HubSet([row])

    def undecoded(decode):
        assert not decode
        return "undecoded"

    library = SimpleNamespace(load_dataset=load_dataset, Image=undecoded)
    monkeypatch.setitem(sys.modules, "datasets", library)
    task = load_task("refcoco", splits=("test",))
    assert [row["answer"] for row in task.test] == ["[10, 20, 40, 25]"] * 2
    assert "cat" in task.test[0]["question"] and "pet" in task.test[1]["question"]
    assert task.is_grounding and task.test[0]["image"] == png


# ---- built-in judges ----


def test_text_is_judged_by_form_value_and_decidability():
    task = Task("maths", [], [])
    for completion, gold, accuracy, answered, form, undecided in (
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1, 1, 1, 0),
        ("The answer is 0.5.", "1/2", 1, 1, 0, 0),
        ("#### 3", "1/2", 0, 1, 0, 0),
        ("#### 18 eggs", "18", 1, 1, 0, 0),
        ("\\boxed{9^{9^{9^9}}}", "1/2", 0, 1, 1, 1),
        ("half", "1/2", 0, 0, 0, 0),
    ):
        assert task.judge(completion, {"question": "q", "answer": gold}) == {
            "accuracy": accuracy,
            "answered": answered,
            "format": form,
            "undecided": undecided,
        }


def test_boxes_are_judged_by_their_overlap(tmp_path):
    task = Task("boxes", [], [], judge_function=rewards.judge_box, answer_function=rewards.find_box)
    row = {"question": "q", "answer": "[10, 10, 20, 20]"}
    for completion, accuracy, answered, form, iou in (
        ("[10, 10, 20, 20]", 1, 1, 1, 1),
        ("<box>10 10 20 20</box>", 1, 1, 0, 1),
        ("[10, 10, 15, 20]", 1, 1, 1, 0.5),
        ("[10, 10, 14, 20]", 0, 1, 1, 0.4),
        ("[20, 20, 10, 10]", 0, 0, 0, 0),
        ("on the left", 0, 0, 0, 0),
    ):
        numbers = task.judge(completion, row)
        assert numbers["iou"] == pytest.approx(iou)
        assert (numbers["accuracy"], numbers["answered"]) == (accuracy, answered)
        assert numbers["format"] == form
    assert task.extract("no, [1,2,3,4]", row) == "(1.0, 2.0, 3.0, 4.0)"
    assert task.extract("on the left", row) is None


# ---- rewards ----

FUNCTIONS = """
    def brevity(completions, **columns):
        return [1 / len(completion) for completion in completions]

    def echo(completions, prompts, question, answer, hint, finish, completion_ids, **others):
        assert completions == ["\\\\boxed{a}", "no idea"]
        assert prompts == question == ["q1", "q2"]
        assert answer == ["a", "b"]
        assert hint == ["h", None]
        assert finish == ["stop", "length"]
        assert [len(ids) for ids in completion_ids] == [10, 8]
        assert others == {"max_new_tokens": 10}
        return [0.5, True]

    def short(completions, **columns):
        return [1.0]

    def scalar(completions, **columns):
        return 1.0

    def text(completions, **columns):
        return ["good"] * len(completions)

    def undefined(completions, **columns):
        return [float("nan")] * len(completions)

    def broken(completions, **columns):
        return columns["no_such_column"]
"""


@pytest.fixture
def functions(tmp_path):
    return write(tmp_path, "my_rewards.py", FUNCTIONS)


@pytest.fixture
def task():
    rows = [{"question": "q1", "answer": "a", "hint": "h"}, {"question": "q2", "answer": "b"}]
    return Task("mine", rows, [])


def score(items, task, completions=("\\boxed{a}", "no idea")):
    """The scores of a completion to each row of the task: 10 tokens that stopped, 8 cut off."""
    found = load_rewards(items, task)
    ids = [[1] * 10, [1] * 8]
    scores = score_rewards(found, task, list(completions), task.train, ["stop", "length"], ids, 10)
    return found, scores


def test_a_reward_is_a_weighted_sum_of_named_numbers(task, functions):
    items = ["accuracy=2", f"{functions}:brevity=0.5", "overlong=-1"]
    found, scores = score(items, task)
    assert [(reward.name, reward.weight) for reward in found] == [
        ("accuracy", 2.0),
        ("brevity", 0.5),
        ("overlong", -1.0),
    ]
    assert scores[0] == {
        "accuracy": 1.0,
        "answered": 1.0,
        "format": 1.0,
        "undecided": 0.0,
        "overlong": -1.0,
        "brevity": 1 / 9,
    }
    assert weighted_sum(scores[0], found) == 2.0 + 0.5 / 9 + 1.0
    assert weighted_sum(scores[1], found) == 0.5 / 7


def test_a_reward_function_is_called_as_trl_calls_it(task, functions):
    _, scores = score([f"{functions}:echo=1"], task)
    assert [values["echo"] for values in scores] == [0.5, 1.0]


def test_overlong_is_always_scored_by_dapo_equation_13(task):
    # limit 100, buffer 20: free up to 80, then (80 - n) / 20, and -1 beyond the limit
    lengths = (0, 80, 85, 90, 100, 101, 500)
    ids = [[1] * n for n in lengths]
    assert overlong([""] * 7, ids, 100) == [0, 0, -0.25, -0.5, -1, -1, -1]
    assert overlong(["", ""], [[1] * 4, [1] * 5], 4) == [0, -1]  # no buffer
    _, scores = score(["accuracy=1"], task)
    assert [values["overlong"] for values in scores] == [-1.0, 0.0]


@pytest.mark.parametrize(
    "name, message",
    [
        ("short", r"'short' must return 2 numbers, not \[1.0\]"),
        ("scalar", "'scalar' must return 2 numbers, not 1.0"),
        ("text", "'text' must return numbers: one is 'good'"),
        ("undefined", "'undefined' must return numbers: one is nan"),
        ("broken", "'broken' fails: KeyError: 'no_such_column' .my_rewards.py, line"),
    ],
)
def test_a_reward_function_that_gives_no_numbers_is_refused(task, functions, name, message):
    with pytest.raises(ValueError, match=message):
        score([f"{functions}:{name}=1"], task)


@pytest.mark.parametrize(
    "items, message",
    [
        (["accuracy"], "NAME=WEIGHT with a number"),
        (["accuracy=much"], "NAME=WEIGHT with a number"),
        (["accuracy=nan"], "NAME=WEIGHT with a number"),
        (["accuracy=inf"], "NAME=WEIGHT with a number"),
        (["=1"], "NAME=WEIGHT with a number"),
        (["beauty=1"], "unknown reward 'beauty': choose from accuracy, .*overlong, FILE.py"),
        (["my_rewards.py=1"], "unknown reward"),
        (["nowhere.py:f=1"], "no such file: nowhere.py"),
        (["accuracy=1", "accuracy=2"], "each name once"),
        (["accuracy=0", "format=0"], "a weight that is not 0"),
        ([], "a weight that is not 0"),
    ],
)
def test_rewards_that_do_not_exist_or_weigh_nothing_are_refused(task, items, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(items, task)


@pytest.mark.parametrize("name", ["step", "reward", "length", "row"])
def test_a_name_that_would_hide_one_of_ours_is_refused(task, tmp_path, name):
    """metrics.jsonl and samples.jsonl have fields of such names; resume reads some of them."""
    file = LOAD + ROW + JUDGE + f"{{'accuracy': 1, '{name}': 2}}\n"
    with pytest.raises(ValueError, match=f"'{name}'.* metrics of our own"):
        load_task(write(tmp_path, "hiding.py", file))
    path = write(tmp_path, "hide.py", f"def {name}(completions, **columns):\n    return [1.0]\n")
    with pytest.raises(ValueError, match=f"there is a reward '{name}' already"):
        load_rewards([f"{path}:{name}=1"], task)


def test_names_of_reward_functions_are_theirs_alone(task, tmp_path, functions):
    path = write(tmp_path, "clash.py", "def accuracy(completions, **columns):\n    return []\n")
    with pytest.raises(ValueError, match="there is a reward 'accuracy' already"):
        load_rewards([f"{path}:accuracy=1"], task)
    with pytest.raises(ValueError, match="each name once"):
        load_rewards([f"{functions}:brevity=1", f"{functions}:brevity=1"], task)
    with pytest.raises(ValueError, match="no function 'nothing' to reward with"):
        load_rewards([f"{functions}:nothing=1"], task)


def test_numbers_of_a_task_files_judge_are_rewards_by_their_names(reverse):
    task = load_task(reverse)
    assert load_rewards(["letters=0.1"], task) == [Reward("letters", 0.1)]
    with pytest.raises(ValueError, match="choose from accuracy, letters, overlong"):
        load_rewards(["format=1"], task)


def test_a_judges_own_number_is_never_overwritten():
    def judge(completion, row):
        return {"accuracy": 1, "overlong": 0.5}

    task = Task("mine", [{"question": "q", "answer": "a"}], [], judge_function=judge)
    found = load_rewards(["overlong=1"], task)
    scores = score_rewards(found, task, ["a"], task.train, ["stop"], [[1] * 10], 10)
    assert scores == [{"accuracy": 1.0, "overlong": 0.5}]


# ---- prompts ----


class Chat:
    """A tokenizer with a template, which remembers how it was called."""

    chat_template = "yes"

    def __init__(self):
        self.options = {}

    def apply_chat_template(self, messages, **options):
        self.options.update(options, messages=messages)
        return "TEXT"

    def __call__(self, text, **options):
        self.options.update(options)
        return {"input_ids": text}


class Plain:
    """A tokenizer without a template, whose ids are the text."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": text}


def test_a_chat_prompt_is_what_the_template_writes():
    tokenizer = Chat()
    assert prompt_ids("How many?", tokenizer, "\nBox it.") == "TEXT"
    assert tokenizer.options == {
        "messages": [{"role": "user", "content": "How many?\nBox it."}],
        "tokenize": False,
        "add_generation_prompt": True,
        "add_special_tokens": False,  # the template wrote them already
    }


def test_plain_and_few_shot_prompts():
    plain = prompt_ids("How many?", Plain(), "\nBox it.")
    assert plain == "Question: How many?\nBox it.\nAnswer:"
    few_shot = prompt_ids("How many?", Chat(), "\nBox it.", style="few-shot")
    assert few_shot.endswith("\n\nQuestion: How many?\nAnswer:")
    assert few_shot.startswith("Question: A box holds") and few_shot.count("\\boxed{") == 2
    with pytest.raises(ValueError, match="no chat template"):
        prompt_ids("How many?", Plain(), style="chat")


def test_a_plain_completion_ends_where_the_next_question_begins():
    assert stop_strings(Plain(), "auto") == ("\nQuestion:",)
    assert stop_strings(Chat(), "few-shot") == ("\nQuestion:",)
    assert stop_strings(Chat(), "auto") == stop_strings(Plain(), "chat") == ()


def test_the_tiny_tokenizer_has_a_template(tokenizer):
    assert tokenizer.decode(prompt_ids("calc 1 + 1", tokenizer)) == "<q> calc 1 + 1 <a>"


# ---- command line ----


def test_the_command_line_checks_answers_and_shows_tasks(capsys, reverse, tmp_path):
    rewards.main(["--check", "50", "0.5"])
    rewards.main(["--check", "x = 1,200", "1200"])
    rewards.main(["--check", "9^{9^{9^{9}}}", "387420489"])
    verdicts = "not equal\nequal\nundecided (counts as not equal)\n"
    assert capsys.readouterr().out == verdicts
    rewards.main(["--task", reverse])
    shown = "first question: bat Backwards, please.\ngold answer: tab\n1 rows\n"
    assert capsys.readouterr().out == shown
    path = write(tmp_path, "rows.jsonl", '{"question": "q", "answer": "1"}\n')
    rewards.main(["--task", "mine", "--data", path])
    assert capsys.readouterr().out.startswith("first question: q\nReason step by step")


def test_errors_are_one_line():
    command = [sys.executable, "rewards.py", "--task", "nowhere.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "rewards.py: no such file: nowhere.py\n"
