"""rewards.py, parts 1 and 2: the tiny world and the tasks."""
import json
import random

import pytest

from rewards import (ANSWER, END, QUESTION, STYLE_WORDS, STYLES, TINY_VOCABULARY, Task, load_rows, load_task, prompt_ids, tiny_answer,
                     tiny_document, tiny_question, tiny_style, tiny_task, tiny_traces)


def solve(text):
    """An independent solver that reads the question as a person would."""
    words = text.split()
    if words[0] == "calc":
        value = int(words[1])
        for sign, amount in zip(words[2:-1:2], words[3:-1:2]):
            value = value + int(amount) if sign == "+" else value - int(amount)
        return str(value % 10)
    a, b, c = map(int, words[2:5])
    for operation in words[6:-1]:
        if operation == "rev":
            a, b, c = c, b, a
        elif operation == "rot":
            a, b, c = b, c, a
        else:
            a, b, c = ((x + (1 if operation == "inc" else -1)) % 10 for x in (a, b, c))
    return f"{a} {b} {c}"


def test_gold_answers_are_right_and_every_style_states_them():
    rng, task = random.Random(0), tiny_task(1, 1)
    for _ in range(500):
        question = tiny_question(rng)
        assert question.answer == solve(question.text)
        for style in STYLES:
            text = tiny_answer(rng, question, style)
            assert set(text.split()) <= set(TINY_VOCABULARY) and len(text.split()) <= 33       # 34 new tokens with the end
            assert tiny_style(text) == style
            assert task.judge(text, question.answer)["accuracy"] == 1.0


def test_written_out_work_is_right_line_by_line():
    rng = random.Random(1)
    question = tiny_question(rng, "arith")
    words = tiny_answer(rng, question, "math").split()
    for i in range(0, 28, 7):
        _, we, left, sign, right, equals, result = words[i:i + 7]
        assert (we, equals) == ("we", "=") and solve(f"calc {left} {sign} {right} ?") == result


def test_a_wrong_or_cut_off_answer_earns_nothing_and_is_told_apart():
    task = tiny_task(1, 1)
    nothing = {"accuracy": 0.0, "answered": 0.0, "format": 0.0, "undecided": 0.0}
    assert task.judge("i think simply maybe is 3", "4") == {**nothing, "answered": 1.0, "format": 1.0}
    assert task.judge("i think simply maybe is 4", "4", finish="length") == nothing
    assert task.judge("hello room", "4") == nothing
    assert task.judge("thus 1 2 3", "2 3")["accuracy"] == 0.0                                  # more digits than asked
    assert task.judge("thus 3", "1 2 3")["accuracy"] == 0.0


def test_a_wrong_list_of_the_tiny_world_is_wrong_not_undecided():
    judged = tiny_task(2, 2).judge("i think answer maybe is 4 1 3", "3 1 4")
    assert judged == {"accuracy": 0.0, "answered": 1.0, "format": 1.0, "undecided": 0.0}


def test_real_tasks_tell_the_asked_form_from_others_and_undecided_from_wrong():
    task = Task("maths", [], [])
    assert task.judge("so it is \\boxed{\\frac{1}{2}}", "0.5") == {"accuracy": 1, "answered": 1, "format": 1, "undecided": 0}
    assert task.judge("The answer is 0.5.", "1/2") == {"accuracy": 1, "answered": 1, "format": 0, "undecided": 0}
    assert task.judge("\\boxed{9^{9^{9^9}}}", "1/2") == {"accuracy": 0, "answered": 1, "format": 1, "undecided": 1}


def test_train_and_test_questions_are_distinct_and_fixed_by_the_seed():
    task = tiny_task(200, 100, seed=3)
    questions = [row["question"] for row in task.train + task.test]
    assert len(task.train) == 200 and len(task.test) == 100 and len(set(questions)) == 300
    assert all(solve(row["question"]) == row["answer"] for row in task.train + task.test)
    assert task.test == tiny_task(200, 100, seed=3).test != tiny_task(200, 100, seed=4).test
    assert {row["family"] for row in task.test[:2]} == {"arith", "list"}


def test_documents_keep_one_style_and_their_titles_hint_at_it():
    rng, titled, soft_rows = random.Random(2), 0, 0
    for _ in range(300):
        words, n_title, soft = tiny_document(rng, 80)
        assert len(words) == 80 and set(words) <= set(TINY_VOCABULARY) and n_title <= 8
        assert all(position < n_title and 2 <= len(bag) <= 16 for position, bag in soft.items())
        text = " ".join(words)
        answers = [part.split(END)[0] for part in text.split(ANSWER)[1:] if END in part]
        assert len({tiny_style(answer) for answer in answers}) <= 1
        if n_title == 0 and words[0] != QUESTION:                   # cut inside an answer of the same style
            assert tiny_style(text.split(END)[0]) in (tiny_style(answers[0]) if answers else "", "none")
        titled, soft_rows = titled + (n_title > 0), soft_rows + bool(soft)
    assert 100 < titled < 250 and 20 < soft_rows < 100


def test_without_context_the_good_styles_are_rare():
    rng, styles = random.Random(3), []
    for _ in range(3000):
        words, n_title, _ = tiny_document(rng, 80)
        if n_title == 0 and words[0] == QUESTION:
            answer = " ".join(words).split(ANSWER)[1]
            styles.append(tiny_style(answer.split(END)[0]))
    assert len(styles) > 300 and styles.count("qa") >= len(styles) - 2


def test_style_words_do_not_overlap():
    words = sum(STYLE_WORDS.values(), [])
    assert len(words) == len(set(words)) and len(TINY_VOCABULARY) == len(set(TINY_VOCABULARY))


def test_traces_take_the_domains_in_turn():
    traces = tiny_traces(6, 0)
    assert [trace["domain"] for trace in traces] == [*STYLES, *STYLES]
    assert all(tiny_style(trace["answer"]) == trace["domain"] for trace in traces)


def test_rows_of_gsm8k_and_of_maths_sets(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": " q ", "answer": "work\n#### 1,200"}) + "\n\n"
                    + json.dumps({"problem": "p", "solution": "s", "final_answer": 7}) + "\n")
    assert load_rows(str(path)) == [{"question": "q", "answer": "1,200"}, {"question": "p", "answer": "7"}]


def test_unicode_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "1"}\n', encoding="utf-8")
    assert load_rows(str(path)) == [{"question": "a\u2028b", "answer": "1"}]


@pytest.mark.parametrize("content, message", [
    ('{"question": "q", "answer": "1"}\nnonsense\n', "line 2: not JSON"), ('{"question": "q"}\n', "line 1: no 'answer'"),
    ('{"question": "", "answer": "1"}\n', "line 1: no 'question'"), ("3\n", "line 1: no 'question'"), ("", "no rows"),
])
def test_malformed_rows_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_rows(str(path))
    assert "rows.jsonl" in str(error.value)


def test_tasks_without_data_say_what_is_missing():
    with pytest.raises(ValueError, match="no train rows of its own"):
        load_task("mine")
    with pytest.raises(ValueError, match="no such file: nowhere.jsonl"):
        load_task("mine", train="nowhere.jsonl", test="x")
    with pytest.raises(ValueError, match="makes its own questions"):
        load_task("tiny", test="x.jsonl")


def test_prompt_formats(tokenizer):
    assert tokenizer.decode(prompt_ids("calc 1 + 1", tokenizer)) == "<q> calc 1 + 1 <a>"

    asked = {}

    class Chat:
        chat_template = "yes"

        def apply_chat_template(self, messages, **options):
            asked.update(options, messages=messages)
            return "TEXT"

        def __call__(self, text, **options):
            asked.update(options)
            return {"input_ids": text}

    assert prompt_ids("How many?", Chat(), "\nBox it.") == "TEXT"
    assert asked == {"messages": [{"role": "user", "content": "How many?\nBox it."}], "tokenize": False,
                     "add_generation_prompt": True, "add_special_tokens": False}     # the template wrote them already

    class Plain:
        chat_template = None

        def __call__(self, text, **_):
            return {"input_ids": text}

    assert prompt_ids("How many?", Plain(), "\nBox it.") == "Question: How many?\nBox it.\nAnswer:"
    few = prompt_ids("How many?", Plain(), "\nBox it.", style="few-shot")
    assert few.endswith("\n\nQuestion: How many?\nAnswer:") and few.count("\\boxed") == 2
    with pytest.raises(ValueError, match="no chat template"):
        prompt_ids("How many?", Plain(), style="chat")
