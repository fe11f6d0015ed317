"""How often the verifier is wrong, and how fast it is: on labelled pairs, hostile inputs, MATH-500.

    python tests/bench_rewards.py            # ours, and math-verify's where it is installed
    python tests/bench_rewards.py --quick    # under 45 s: math-verify judges every 8th pair
    python tests/bench_rewards.py A.jsonl    # other pairs, of any JSONL in this form:
        {"answer": "1/2", "gold": "0.5", "equal": true, "source": "mine"}

A row may have a whole "completion" in place of an "answer"; its answer is extracted from it. Errors
are counted by "source", or by "class", or in all. The last line is one JSON object. A check is one
call answers_equal(answer, gold), without any cache of earlier answers. The table of our own pairs
is tests/answer_pairs.jsonl; `pip install math-verify` for the other column.
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

TABLE = HERE / "answer_pairs.jsonl"
MATH500 = HERE.parent.parent / "shared" / "data" / "math500.jsonl"
COLUMNS = ("equal", "missed", "unequal", "taken", "undecided")


def load_pairs(path):
    """Rows {answer, gold, equal, source} of a JSONL. ValueError naming the line that is no pair."""
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answer = row.get("answer")
            if answer is None:
                answer = rewards.extract_answer(row["completion"], rewards.ACCEPTED) or ""
            source = row.get("source") or row.get("class") or Path(path).stem
            pair = {"answer": str(answer), "gold": str(row["gold"]), "equal": bool(row["equal"])}
        except (ValueError, KeyError, AttributeError) as error:
            wanted = "{answer or completion, gold, equal}"
            raise ValueError(f"{path}, line {number}: no {wanted} in it ({error!r})") from None
        pairs.append(pair | {"source": source})
    return pairs


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
    """Print a table of a judge's errors by source of pairs; the totals, as a dictionary."""
    start = time.process_time()  # CPU time: other jobs on the machine do not count
    verdicts = [judge(pair["answer"], pair["gold"]) for pair in pairs]
    rate = len(pairs) / (time.process_time() - start)

    sources = {}
    total = Counter()
    for pair, verdict in zip(pairs, verdicts):
        counts = count(pair, verdict)
        sources.setdefault(pair["source"], Counter()).update(counts)
        total.update(counts)

    print(f"\n{name:16s}" + "".join(f"{column:>10s}" for column in COLUMNS))
    for label, counts in [*sorted(sources.items()), ("all", total)]:
        print(f"{label:16.16s}" + "".join(f"{counts[column]:10d}" for column in COLUMNS))
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
    parser.add_argument("files", nargs="*", help="JSONL files of pairs (default: our own table)")
    args = parser.parse_args()
    pairs = []
    for path in args.files or [TABLE]:
        pairs += load_pairs(path)
    if not pairs:
        raise ValueError(f"no pairs in {args.files}")

    rewards.answers_equal(r"\sqrt{2}", "x")  # warms the caches of regular expressions
    ours = measure("ours", rewards.answers_equal, pairs)
    if not args.files:
        ours |= measure_more(args.quick)

    result = {"ours": ours}
    judge = math_verify_judge()
    if judge is not None:
        some_pairs = pairs[::8] if args.quick else pairs
        result["math_verify"] = measure("math-verify", judge, some_pairs)
    print(json.dumps(result))


def measure_more(quick):
    """The time that hostile inputs take, and the golds of MATH-500 against themselves."""
    slowest, name = worst_hostile(2 if quick else 5)
    print(f"worst of {len(HOSTILE)} hostile inputs: {slowest:.1f} ms ({name})")
    numbers = {"worst_hostile_ms": round(slowest, 1), "hostile_inputs": len(HOSTILE)}
    if MATH500.exists():
        lines = MATH500.read_text(encoding="utf-8").splitlines()
        golds = [json.loads(line)["answer"] for line in lines]
        read = sum(rewards.answers_equal(f"$ {gold} $.", gold) is True for gold in golds)
        print(f"MATH-500: {read}/{len(golds)} gold answers equal themselves when parsed")
        numbers["math500_self"] = read
    return numbers


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench_rewards.py: {error}")
