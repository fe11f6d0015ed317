"""How often the verifier is wrong and how fast it is: on tests/answer_pairs.jsonl, hostile inputs and MATH-500.

    python tests/bench_rewards.py            # ours, and math-verify where it is installed (pip install math-verify)
    python tests/bench_rewards.py --quick    # under 45 s: math-verify judges every 8th pair

The last line is one JSON object. A check is one call answers_equal(answer, gold) without any cache of earlier answers.
"""
import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import rewards  # noqa: E402
from hostile import HOSTILE  # noqa: E402

PAIRS = [json.loads(line) for line in (HERE / "answer_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
MATH500 = HERE.parent.parent / "shared" / "data" / "math500.jsonl"


def math_verify_judge():
    """math-verify as a function (answer, gold) -> bool, both sides set in dollars; None if it is absent."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def setting(text):
        return text if "$" in text else f"${text}$"
    return lambda answer, gold: bool(verify(parse(setting(gold)), parse(setting(answer))))


def measure(judge, pairs):
    """Errors of a judge per class: ({class: Counter}, total Counter, checks per second)."""
    classes, start = {}, time.process_time()                     # CPU time: other jobs on the machine do not count
    verdicts = [judge(p["answer"], p["gold"]) for p in pairs]
    rate = len(pairs) / (time.process_time() - start)
    for pair, verdict in zip(pairs, verdicts):
        kind = ("false positive" if verdict else "") if not pair["equal"] else "" if verdict else "false negative"
        counts = classes.setdefault(pair["class"], Counter())
        counts.update(["equal" if pair["equal"] else "unequal", kind] + ["undecided"] * (verdict is None))
    return classes, sum(classes.values(), Counter()), rate


def show(name, classes, total, rate):
    print(f"\n{name:14s} {'equal':>6s} {'missed':>7s} {'unequal':>8s} {'taken':>6s} {'undecided':>10s}")
    for label, c in [*sorted(classes.items()), ("all", total)]:
        print(f"{label:14s} {c['equal']:6d} {c['false negative']:7d} {c['unequal']:8d} {c['false positive']:6d} "
              f"{c['undecided']:10d}")
    print(f"{rate:,.0f} checks a second on one core")
    return {"equal": total["equal"], "unequal": total["unequal"], "undecided": total["undecided"],
            "false_positives": total["false positive"], "false_negatives": total["false negative"],
            "checks_per_second": round(rate)}


def worst_hostile(repeats):
    """(milliseconds, name) of the slowest hostile check or extraction: each the best of `repeats`, against noise."""
    worst = (0.0, "")
    for name, text in HOSTILE.items():
        calls = [lambda gold=gold: rewards.answers_equal(text, gold) for gold in ("42", f"${text}$", f"1+{text}")]
        calls += [lambda how=how: rewards.extract_answer(f"\\boxed{{ #### answer is <answer>{text}", how)
                  for how in ("boxed", "hash", "phrase", "tag", "last")] + [lambda: rewards.box_iou(text, text)]
        for call in calls:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
            worst = max(worst, (min(times), name))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset for math-verify, fewer repeats")
    quick = parser.parse_args().quick
    rewards.answers_equal(r"\sqrt{2}", "x")                       # warm the regex caches
    result = {"ours": show("ours", *measure(rewards.answers_equal, PAIRS))}
    milliseconds, name = worst_hostile(2 if quick else 5)
    print(f"worst of {len(HOSTILE)} hostile inputs: {milliseconds:.1f} ms ({name})")
    result["ours"] |= {"worst_hostile_ms": round(milliseconds, 1), "hostile_inputs": len(HOSTILE)}
    if MATH500.exists():
        golds = [json.loads(line)["answer"] for line in MATH500.read_text(encoding="utf-8").splitlines()]
        parsed = sum(rewards.answers_equal(f"$ {g} $.", g) is True for g in golds)
        print(f"MATH-500: {parsed}/{len(golds)} gold answers equal themselves when parsed")
        result["ours"]["math500_self"] = parsed
    judge = math_verify_judge()
    if judge:
        result["math_verify"] = show("math-verify", *measure(judge, PAIRS[::8] if quick else PAIRS))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
