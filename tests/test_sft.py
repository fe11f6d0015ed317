"""sft.py: the loss under a prefix, run folders, exact resume, and the tiny base's documents."""
import json
import random
from types import SimpleNamespace

import pytest
import torch

import sft
from prefix import Palette
from rewards import ANSWER, END, PAD, QUESTION, TINY_VOCABULARY, tiny_document
from sft import Ranks, Run, answer_ids, lm_step, pairs_of, seed_of, tiny_batch, warmup

ALONE = Ranks(0, 1, torch.device("cpu"))
WORD_ID = {word: i for i, word in enumerate(TINY_VOCABULARY)}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def rows_and_prefixes(model, tokenizer, vae, traces):
    rows = [answer_ids(trace, tokenizer, "auto", 64) for trace in traces[:8]]
    prefixes, _ = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", 2).draw(range(8))
    return rows, [prefix if i % 2 else None for i, prefix in enumerate(prefixes)]


def test_the_loss_is_the_plain_one_of_transformers_on_answer_tokens_end_token_included(model, rows_and_prefixes):
    rows, prefixes = rows_and_prefixes
    loss_sum, tokens = lm_step(model, rows, prefixes, ALONE)
    ours, embed = gradients(model), model.get_input_embeddings()
    model.zero_grad()
    total = 0.0
    for (prompt, answer), prefix in zip(rows, prefixes):
        assert answer[-1] == WORD_ID[END]
        lead = prefix if prefix is not None else torch.zeros(0, 128)
        inputs = torch.cat([lead, embed(torch.tensor(prompt + answer))])[None]
        labels = torch.tensor([[-100] * (len(lead) + len(prompt)) + answer])
        total = total + model(inputs_embeds=inputs, labels=labels).loss * len(answer)
    count = sum(len(answer) for _, answer in rows)
    (total / count).backward()
    assert tokens == count and loss_sum == pytest.approx(total.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_gradient_does_not_depend_on_the_micro_batches(model, rows_and_prefixes):
    found = []
    for tokens_per_batch in (1, 120, 100_000):              # one row, about three rows, all rows
        model.zero_grad()
        lm_step(model, *rows_and_prefixes, ALONE, tokens_per_batch)
        found.append(gradients(model))
    for other in found[1:]:
        for name in other:
            torch.testing.assert_close(found[0][name], other[name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_end_token_is_learnt_even_where_it_is_also_the_pad_token(model, tokenizer):
    """Bug 1 of design.md: pad == EOS must not mask EOS out of the loss."""
    rows = [([WORD_ID["calc"]], [WORD_ID["so"], WORD_ID[END]]), ([WORD_ID["calc"]] * 5, [WORD_ID["thus"]] * 4 + [WORD_ID[END]])]
    model.config.pad_token_id = WORD_ID[END]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(15):
        lm_step(model, rows, [None, None], ALONE)
        optimizer.step()
        optimizer.zero_grad()
    logits = model(input_ids=torch.tensor([[WORD_ID["calc"], WORD_ID["so"]]])).logits[0, -1]
    assert logits.argmax().item() == WORD_ID[END]


def test_every_rank_divides_by_the_answer_tokens_of_all_ranks(model, rows_and_prefixes, monkeypatch):
    """Bug 3 of design.md: two ranks with uneven shares. Their gradients must add up to one rank's."""
    rows, prefixes = rows_and_prefixes
    lm_step(model, rows, prefixes, ALONE)
    expected, count = gradients(model), sum(len(answer) for _, answer in rows)
    model.zero_grad()
    for share in (slice(0, 3), slice(3, 8)):
        rank = Ranks(0, 1, torch.device("cpu"))
        rank.total = lambda values: [count]                 # what all_reduce would give
        lm_step(model, rows[share], prefixes[share], rank)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(expected[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_gradients_are_clipped_and_a_broken_one_stops_the_run(model):
    for scale, moved in ((0.01, True), (100.0, True), (float("nan"), False)):
        weight = torch.nn.Linear(1, 1, bias=False)
        weight.weight.grad = torch.full((1, 1), scale)
        before, optimizer = weight.weight.item(), torch.optim.SGD(weight.parameters(), lr=1.0)
        if moved:
            assert sft.apply_gradients(weight, [optimizer], ALONE) == pytest.approx(scale)
            assert before - weight.weight.item() == pytest.approx(min(scale, 1.0), rel=1e-4)
        else:
            with pytest.raises(ValueError, match="not finite"):
                sft.apply_gradients(weight, [optimizer], ALONE)
            assert weight.weight.item() == before


def test_the_warm_up_draws_fresh_latents_and_fresh_traces_at_every_step(tmp_path, policy_folder, vae, traces, monkeypatch):
    seen = []
    monkeypatch.setattr(sft, "lm_step", lambda model, rows, prefixes, *_: seen.append((rows, prefixes)) or (1.0, 1))
    monkeypatch.setattr(sft, "apply_gradients", lambda *_: 0.0)
    warm(tmp_path, "r", policy_folder, vae, traces)
    assert len(seen) == 5 and len({str(rows) for rows, _ in seen}) == 5
    assert len({tuple(prefix.flatten().tolist()) for _, prefixes in seen for prefix in prefixes}) == 5 * 6


def test_answers_carry_their_end_token_and_over_long_prompts_are_left_out(tokenizer, traces):
    prompt, answer = answer_ids({"question": "calc 1 + 1 ?", "answer": "so 2"}, tokenizer, "auto", 64)
    assert tokenizer.decode(prompt) == "<q> calc 1 + 1 ? <a>" and tokenizer.decode(answer) == "so 2 <end>"
    assert answer_ids({"question": "calc 1 + 1 ?", "answer": "so 2"}, tokenizer, "auto", 5) == (None, None)
    assert answer_ids(traces[0], tokenizer, "auto", 20)[1][-1] != WORD_ID[END]


def warm_args(**changes):
    return SimpleNamespace(**{**dict(steps=5, batch=6, lr=1e-3, seed=0, prompt="auto", max_tokens=64, tokens_per_batch=512,
                                     precision="fp32", save_every=2, lr_schedule="constant", lr_warmup=0), **changes})


def warm(tmp_path, name, policy_folder, vae, traces, resume=False, stop_after=None):
    """A warm-up run in tmp_path/name; stop_after: die after that many optimizer steps, as a kill would."""
    model, tokenizer = sft.load_policy(str(policy_folder))
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", 1)
    run = Run(tmp_path / name, {"seed": 0}, ALONE, resume=resume)
    original, count = sft.apply_gradients, [0]

    def dying(*arguments, **options):
        if count[0] == stop_after:
            raise KeyboardInterrupt
        count[0] += 1
        return original(*arguments, **options)

    sft.apply_gradients = dying
    try:
        warmup(model, tokenizer, pairs_of(traces, tokenizer, warm_args(), ALONE), palette, run, warm_args())
    finally:
        sft.apply_gradients = original
    return model, [{k: v for k, v in json.loads(line).items() if k != "seconds"}
                   for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, policy_folder, vae, traces, stop_after):
    whole, metrics = warm(tmp_path, "whole", policy_folder, vae, traces)
    with pytest.raises(KeyboardInterrupt):
        warm(tmp_path, "torn", policy_folder, vae, traces, stop_after=stop_after)
    resumed, resumed_metrics = warm(tmp_path, "torn", policy_folder, vae, traces, resume=True)
    assert resumed_metrics == metrics and len(metrics) == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, policy_folder, vae, traces, capsys):
    with pytest.raises(KeyboardInterrupt):
        warm(tmp_path, "torn", policy_folder, vae, traces, stop_after=4)
    newest = sorted((tmp_path / "torn").glob("checkpoint-*"))[-1]
    assert newest.name == "checkpoint-000004"
    (newest / "tensors.safetensors").write_bytes(b"torn")
    resumed, metrics = warm(tmp_path, "torn", policy_folder, vae, traces, resume=True)
    assert "checkpoint-000004 cannot be read" in capsys.readouterr().out
    whole, expected = warm(tmp_path, "whole", policy_folder, vae, traces)
    assert metrics == expected
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_run_without_a_readable_checkpoint_is_refused_and_keeps_what_it_has(tmp_path, model):
    """As one that another version of this file has left: going back to step 0 would drop its metrics."""
    run = Run(tmp_path / "r", {}, ALONE)
    run.log("metrics", {"step": 1})
    run.save(1, model, [])
    (tmp_path / "r" / "checkpoint-000001" / "state.json").write_text('{"step": 1}')
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read here \('crc32'\).*--overwrite"):
        run.restore(model, [])
    assert (tmp_path / "r" / "metrics.jsonl").read_text() and len(run.checkpoints()) == 1


def test_an_unreadable_checkpoint_is_not_kept_in_place_of_the_next_one(tmp_path, model):
    run = Run(tmp_path / "r", {}, ALONE)
    for step in (2, 4):
        run.save(step, model, [])
    (tmp_path / "r" / "checkpoint-000004" / "state.json").write_text("torn")
    run.restore(model, [])
    run.save(3, model, [])                                  # --save-every may be another now
    assert [path.name for path in run.checkpoints()] == ["checkpoint-000002", "checkpoint-000003"]


def test_a_checkpoint_with_a_missing_or_changed_file_is_refused(tmp_path, model):
    """Each rank writes a file: with one of them gone, its rows would be read as zeros. A lost page leaves zeros, too."""
    run = Run(tmp_path / "r", {}, ALONE)
    run.save(1, model, [])
    path = tmp_path / "r" / "checkpoint-000001" / "tensors.safetensors"
    saved = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match="its files are not as they were saved"):
        sft.read_checkpoint(path.parent, model, [], ALONE)
    for content in (saved[:-1], saved[:-8192] + bytes(4096) + saved[-4096:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="its files are not as they were saved"):
            sft.read_checkpoint(path.parent, model, [], ALONE)
    path.write_bytes(saved)
    assert sft.read_checkpoint(path.parent, model, [], ALONE)[1] == {"step": 1}


@pytest.mark.parametrize("error, said", [(OSError(11, "Resource temporarily unavailable"), "[Errno 11]"), (MemoryError(), "MemoryError")])
def test_a_checkpoint_that_cannot_be_read_now_is_set_aside_not_deleted(tmp_path, model, tokenizer, monkeypatch, capsys, error, said):
    run, original = Run(tmp_path / "r", {}, ALONE), sft.read_checkpoint
    for step in (1, 2):
        run.save(step, model, [])

    def read(folder, *arguments):
        if folder.name == "checkpoint-000002":
            raise error
        return original(folder, *arguments)

    monkeypatch.setattr(sft, "read_checkpoint", read)
    assert run.restore(model, [])["step"] == 1
    printed = capsys.readouterr().out
    assert f"cannot be read ({said}" in printed and "is now" in printed
    assert (tmp_path / "r" / "unreadable-checkpoint-000002" / "tensors.safetensors").is_file()
    run.finish(model, tokenizer)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["config.json", "policy"]


def test_before_the_first_checkpoint_a_former_best_is_not_kept(tmp_path, model, tokenizer):
    run = Run(tmp_path / "r", {}, ALONE)
    for step, score in enumerate((0.1, 0.2, 0.3)):          # a resumed run would begin anew, and make them again
        run.keep_best(step, score, model, tokenizer)
    assert best_steps(tmp_path / "r") == {"best": 2}


def best_steps(folder):
    return {path.name: json.loads((path / "best.json").read_text())["step"] for path in folder.glob("best*")}


def test_the_best_policy_is_kept_and_is_what_it_was_at_the_step_that_a_run_resumes_from(tmp_path, model, tokenizer):
    """Scores by step; checkpoints after steps 2, 4, 6. The earliest of equals is kept, with its own weights."""
    scores, run = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.4, 5: 0.6, 6: 0.7, 7: 0.9}, Run(tmp_path / "r", {}, ALONE)
    weight = model.model.norm.weight
    for step, score in scores.items():
        weight.data.fill_(step)
        run.keep_best(step, score, model, tokenizer)
        if step % 2 == 0:
            run.save(step, model, [])
    assert best_steps(tmp_path / "r") == {"best": 7, "best-000006": 6, "best-000005": 5, "best-000002": 2}
    for newest, best, score in ((6, 6, 0.7), (4, 2, 0.5)):              # checkpoint 4, after 6 has been found torn
        again = Run(tmp_path / "r", {}, ALONE, resume=True)
        assert again.restore(model, [])["step"] == newest
        assert best_steps(tmp_path / "r")["best"] == best == again.best["step"] and again.best["score"] == score
        loaded, _ = sft.load_policy(str(tmp_path / "r" / "best"))
        assert loaded.model.norm.weight.unique().tolist() == [best]
        if newest == 6:
            (tmp_path / "r" / "checkpoint-000006" / "tensors.safetensors").write_bytes(b"torn")
    again.keep_best(5, 0.5, model, tokenizer)
    assert again.best["step"] == 2
    again.finish(model, tokenizer)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["best", "config.json", "policy"]


def test_checkpointing_runs_layers_again_and_changes_no_gradient(tmp_path, policy_folder, vae, traces):
    """Our policies are in eval mode, in which transformers would silently ignore gradient checkpointing."""
    found, calls = [], []
    for checkpointing in (False, True):
        model, tokenizer = sft.load_trainable(str(policy_folder), ALONE, warm_args(checkpointing=checkpointing))
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(checkpointing))
        rows = [answer_ids(trace, tokenizer, "auto", 64) for trace in traces[:8]]
        lm_step(model, rows, [None] * 8, ALONE)
        found.append(gradients(model))
        assert not any(module.training for layer in model.model.layers for module in layer.modules() if module is not layer)
    assert (calls.count(False), calls.count(True)) == (2, 4)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-6, msg=name)


def test_the_learning_rate_is_a_function_of_the_step_alone():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rate = lambda step, schedule, warmup: sft.set_learning_rate(optimizer, warm_args(steps=8, lr=2.0, lr_schedule=schedule,
                                                                                     lr_warmup=warmup), step)
    assert [rate(step, "constant", 3) for step in (0, 1, 3, 7)] == [0.5, 1.0, 2.0, 2.0]
    assert [rate(step, "linear", 0) for step in (0, 4, 6)] == [2.0, 1.0, 0.5]
    assert [rate(step, "cosine", 0) for step in (0, 4, 6)] == pytest.approx([2.0, 1.0, 1 - 0.5 ** 0.5])
    assert optimizer.param_groups[0]["lr"] == rate(6, "cosine", 0)


def test_run_folders_refuse_other_settings_and_unfinished_runs(tmp_path, model, tokenizer):
    Run(tmp_path / "r", {"lr": 1.0}, ALONE)
    with pytest.raises(ValueError, match="unfinished run: --resume"):
        Run(tmp_path / "r", {"lr": 1.0}, ALONE)
    with pytest.raises(ValueError, match=r"another lr \(was 1.0, now 2.0\)"):
        Run(tmp_path / "r", {"lr": 2.0}, ALONE, resume=True)
    run = Run(tmp_path / "r", {"lr": 2.0}, ALONE, overwrite=True)
    run.finish(model, tokenizer)
    assert Run(tmp_path / "r", {"lr": 2.0}, ALONE).finished
    loaded, _ = sft.load_policy(str(tmp_path / "r"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path, model, tokenizer):
    run = Run(tmp_path / "r", {"lr": 1.0}, ALONE)
    run.save(1, model, [])
    run.log("metrics", {"step": 1})
    (tmp_path / "r" / "mine.txt").write_text("precious")
    Run(tmp_path / "r", {"lr": 2.0}, ALONE, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["config.json", "mine.txt"]


def test_a_kill_while_overwriting_leaves_no_checkpoint_to_a_run_of_other_settings(tmp_path, model, monkeypatch):
    Run(tmp_path / "r", {"lr": 1.0}, ALONE).save(1, model, [])
    monkeypatch.setattr(sft.shutil, "rmtree", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Run(tmp_path / "r", {"lr": 2.0}, ALONE, overwrite=True)
    with pytest.raises(ValueError, match="another lr"):
        Run(tmp_path / "r", {"lr": 2.0}, ALONE, resume=True)


def test_overwriting_leaves_nothing_of_the_run_before(tmp_path, model, tokenizer):
    run = Run(tmp_path / "r", {"lr": 1.0}, ALONE)
    run.log("metrics", {"step": 1})
    run.keep_best(1, 0.5, model, tokenizer)
    run.save(1, model, [])
    run.finish(model, tokenizer)
    (tmp_path / "r" / "notes.txt").write_text("of the user")
    Run(tmp_path / "r", {"lr": 2.0}, ALONE, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["config.json", "notes.txt"]


def test_what_a_kill_between_the_policy_and_the_tidying_leaves_is_tidied_later(tmp_path, model, tokenizer, monkeypatch):
    run = Run(tmp_path / "r", {}, ALONE)
    run.save(1, model, [])
    monkeypatch.setattr(Run, "tidy", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.finish(model, tokenizer)
    monkeypatch.undo()
    (tmp_path / "r" / ".checkpoint-000002.tmp").mkdir()
    assert Run(tmp_path / "r", {}, ALONE).finished
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["config.json", "policy"]


def test_a_half_filled_folder_is_no_checkpoint(tmp_path, model):
    run = Run(tmp_path / "r", {}, ALONE)
    run.save(1, model, [])
    with pytest.raises(KeyboardInterrupt), run.new_folder("checkpoint-000002") as folder:
        assert folder.exists() and [path.name for path in run.checkpoints()] == ["checkpoint-000001"]
        raise KeyboardInterrupt
    assert not folder.exists() and run.restore(model, [])["step"] == 1


def test_a_torn_last_line_is_dropped_on_resume(tmp_path, model, tokenizer):
    run = Run(tmp_path / "r", {}, ALONE)
    run.log("metrics", {"step": 1}, {"step": 2})
    run.save(2, model, [])
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "completion": "\\boxed{5}')
    (tmp_path / "r" / "traces.jsonl").write_text('{"question": "not a metric"}\n')
    assert run.restore(model, [])["step"] == 2
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "r" / "traces.jsonl").read_text() == '{"question": "not a metric"}\n'


def test_fsdp_without_ranks_is_refused():
    with pytest.raises(ValueError, match="--fsdp shards over several ranks: start them with torchrun"):
        Ranks.start("cpu", fsdp=True)


def test_an_unusable_device_is_one_sentence():
    with pytest.raises(ValueError, match="--device banana cannot be used here"):
        Ranks.start("banana")


def test_a_save_that_fails_leaves_the_old_one_and_no_debris(tmp_path, model, tokenizer, monkeypatch):
    run = Run(tmp_path / "r", {}, ALONE)
    run.save(1, model, [])
    monkeypatch.setattr(sft, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run.save(2, model, [])
    assert [path.name for path in (tmp_path / "r").iterdir() if path.is_dir()] == ["checkpoint-000001"]


def test_only_the_newest_checkpoints_are_kept(tmp_path, model, tokenizer):
    run = Run(tmp_path / "r", {}, ALONE, keep=2)
    for step in (1, 2, 3):
        run.save(step, model, [])
    assert [path.name for path in run.checkpoints()] == ["checkpoint-000002", "checkpoint-000003"]


def test_seeds_are_fixed_and_distinct():
    assert seed_of(0, "rollout", 1, 2) == seed_of(0, "rollout", 1, 2) >= 0
    assert len({seed_of(s, "rollout", a, b) for s in range(5) for a in range(20) for b in range(20)}) == 2000


def test_tiny_documents_weigh_what_is_to_be_learnt(model, tokenizer):
    table = model.get_input_embeddings().weight.detach()
    ids, embeddings, weights, positions = tiny_batch(0, 0, 16, 80, model, tokenizer)
    assert ids.shape == weights.shape == (16, 80) and embeddings.shape == (16, 80, 128) and positions is None
    assert torch.equal(ids, tiny_batch(0, 0, 16, 80, model, tokenizer)[0])
    assert not torch.equal(ids, tiny_batch(0, 1, 16, 80, model, tokenizer)[0])
    for row, weight in zip(ids.tolist(), weights.tolist()):
        words = [TINY_VOCABULARY[i] for i in row]
        inside = False
        first = words.index(QUESTION)
        for position, (word, value) in enumerate(zip(words, weight)):
            if word == QUESTION:
                assert position == first or value == 1.0    # that a question follows is learnt (after a title: either)
                inside = True
            elif inside:
                assert value == 0.0, (word, position)       # question words and <a>
                inside = word != ANSWER
            elif position > first:
                assert value == 1.0, (word, position)
    changed = (embeddings != table[ids]).any(-1)
    assert changed.any() and not changed[:, 8:].any()       # soft rows stand in titles only
    rng = random.Random(seed_of(0, "document", 0))
    for row, (_, _, soft) in zip(embeddings, [tiny_document(rng, 80) for _ in range(16)]):
        for position, bag in soft.items():
            mean = sum(table[WORD_ID[word]] for word in bag) / len(bag)
            torch.testing.assert_close(row[position], mean)


def test_the_tiny_base_is_an_ordinary_folder_and_resumes_exactly(tmp_path, capsys, monkeypatch):
    whole = sft.pretrain(tmp_path / "whole", steps=4, batch=4, save_every=2)
    original = sft.apply_gradients
    calls = []
    monkeypatch.setattr(sft, "apply_gradients", lambda *a: (calls.append(0), original(*a))[1] if len(calls) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sft.pretrain(tmp_path / "torn", steps=4, batch=4, save_every=2)
    monkeypatch.setattr(sft, "apply_gradients", original)
    torn = sft.pretrain(tmp_path / "torn", steps=4, batch=4, save_every=2, resume=True)
    (a, tokenizer), (b, _) = (sft.load_policy(str(run.folder)) for run in (whole, torn))
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert tokenizer.pad_token == PAD and a.generation_config.eos_token_id == WORD_ID[END]
    assert "opens in style math" in capsys.readouterr().out
    assert len((whole.folder / "traces.jsonl").read_text().splitlines()) == 3000


@pytest.mark.parametrize("argv, message", [
    (["--steps", "0"], "--steps: must be at least 1, not 0"), (["--batch", "-3"], "--batch: must be at least 1, not -3"),
    (["--model", "some/model"], "--traces is needed"), (["--lr", "nan"], "--lr: must be at least 0 and finite, not nan"),
    (["--lr-warmup", "-1"], "--lr-warmup: must be at least 0, not -1"), (["--length", "-1"], "--length: must be at least 0, not -1"),
    (["--batch", "0"], "--batch: must be at least 1, not 0"), (["pretrain", "--lr", "5"], "--lr is of warmup: pretrain does not read"),
    (["pretrain", "--traces", "x"], "--traces is of warmup"), (["pretrain", "--model", "x"], "pretrain makes tiny or tiny-vl, not x"),
])
def test_bad_flags_end_with_one_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sft.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_domain_of_the_vae_that_is_there_may_be_a_prefix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown prefix source 'poetry'"):
        sft.parse_args(["--prefix", "poetry"])
    (tmp_path / "runs" / "tiny" / "vae").mkdir(parents=True)                # made by vae.py from traces of one's own
    assert sft.parse_args(["--prefix", "poetry"]).prefix == "poetry"


def test_what_cannot_be_trained_on_is_refused_before_anything_is_made(tmp_path, monkeypatch, policy_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traces.jsonl").write_text('{"question": "calc 1 + 1 ?", "answer": "so 2", "domain": "math"}\n')
    (tmp_path / "torn.jsonl").write_text('{"question": "calc')
    for argv, message in ((["--prefix", "poetry"], "unknown prefix source 'poetry'"), (["--traces", "x.jsonl"], "no such file: x.jsonl"),
                          (["--traces", "torn.jsonl"], "torn.jsonl, line 1: not JSON"),
                          (["--model", str(policy_folder), "--traces", "traces.jsonl", "--prefix", "none", "--max-tokens", "3"],
                           "over --max-tokens 3: raise it")):
        with pytest.raises(ValueError, match=message):
            sft.main([*argv, "--device", "cpu"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torn.jsonl", "traces.jsonl"]
