"""How often the verifier is wrong, and how fast it is: on the table, hostile inputs, MATH-500.

    python tests/bench_rewards.py            # ours, and math-verify's where it is installed
    python tests/bench_rewards.py --quick    # under 45 s: math-verify judges every 8th pair

The last line is one JSON object. A check is one call answers_equal(answer, gold), without any cache
of earlier answers. The table is tests/answer_pairs.jsonl; `pip install math-verify` for the other.
"""

import argparse
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from hostile import HOSTILE  # noqa: E402

import rewards  # noqa: E402  after the path

LINES = (HERE / "answer_pairs.jsonl").read_text(encoding="utf-8").splitlines()
PAIRS = [json.loads(line) for line in LINES]
MATH500 = HERE.parent.parent / "shared" / "data" / "math500.jsonl"
COLUMNS = ("equal", "missed", "unequal", "taken", "undecided")


def math_verify_judge():
    """math-verify as a function (answer, gold) -> bool; None if it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def read(text):
        if "$" not in text:
            text = f"${text}$"
        return parse(text)

    def judge(answer, gold):
        return bool(verify(read(gold), read(answer)))

    return judge


def count(pair, verdict):
    """What a verdict on a pair adds to the COLUMNS."""
    counts = Counter()
    if pair["equal"]:
        counts["equal"] = 1
        counts["missed"] = int(not verdict)
    else:
        counts["unequal"] = 1
        counts["taken"] = int(bool(verdict))
    counts["undecided"] = int(verdict is None)
    return counts


def measure(name, judge, pairs):
    """Print a table of a judge's errors by class of pairs; the totals, as a dictionary."""
    start = time.process_time()  # CPU time: other jobs on the machine do not count
    verdicts = [judge(pair["answer"], pair["gold"]) for pair in pairs]
    rate = len(pairs) / (time.process_time() - start)

    classes = {}
    total = Counter()
    for pair, verdict in zip(pairs, verdicts):
        counts = count(pair, verdict)
        classes.setdefault(pair["class"], Counter()).update(counts)
        total.update(counts)

    print(f"\n{name:14s}" + "".join(f"{column:>10s}" for column in COLUMNS))
    for label, counts in [*sorted(classes.items()), ("all", total)]:
        print(f"{label:14s}" + "".join(f"{counts[column]:10d}" for column in COLUMNS))
    print(f"{rate:,.0f} checks a second on one core")
    return {
        "equal": total["equal"],
        "unequal": total["unequal"],
        "undecided": total["undecided"],
        "false_positives": total["taken"],
        "false_negatives": total["missed"],
        "checks_per_second": round(rate),
    }


def milliseconds(call, repeats):
    """The shortest time of several, against noise."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def worst_hostile(repeats):
    """(milliseconds, name) of the slowest check, extraction or box of all hostile inputs."""
    worst = (0.0, "")
    for name, text in HOSTILE.items():
        calls = [partial(rewards.box_iou, text, text)]
        for gold in ("42", f"${text}$", f"1+{text}"):
            calls.append(partial(rewards.answers_equal, text, gold))
        completion = f"\\boxed{{ #### answer is <answer>{text}"
        for how in rewards.FORMS:
            calls.append(partial(rewards.extract_answer, completion, how))
        for call in calls:
            worst = max(worst, (milliseconds(call, repeats), name))
    return worst


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a subset for math-verify, fewer repeats"
    )
    quick = parser.parse_args().quick

    rewards.answers_equal(r"\sqrt{2}", "x")  # warms the caches of regular expressions
    ours = measure("ours", rewards.answers_equal, PAIRS)
    slowest, name = worst_hostile(2 if quick else 5)
    print(f"worst of {len(HOSTILE)} hostile inputs: {slowest:.1f} ms ({name})")
    ours["worst_hostile_ms"] = round(slowest, 1)
    ours["hostile_inputs"] = len(HOSTILE)

    if MATH500.exists():
        lines = MATH500.read_text(encoding="utf-8").splitlines()
        golds = [json.loads(line)["answer"] for line in lines]
        read = sum(rewards.answers_equal(f"$ {gold} $.", gold) is True for gold in golds)
        print(f"MATH-500: {read}/{len(golds)} gold answers equal themselves when parsed")
        ours["math500_self"] = read

    result = {"ours": ours}
    judge = math_verify_judge()
    if judge is not None:
        pairs = PAIRS[::8] if quick else PAIRS
        result["math_verify"] = measure("math-verify", judge, pairs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
