"""vae.py in isolation: the formulas against hand-computed numbers, the files, and the sentences for bad input."""
import argparse
import json
import math

import pytest
import torch

import vae as vae_script
from vae import VAE, add_flags, as_flags, fit_domains, load_traces, mean_pool, pca, report, train_vae


class Words:
    """A stand-in tokenizer: words are numbers, so that the embeddings of a text can be written down by hand."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def test_h_is_the_mean_of_the_raw_embeddings_of_question_and_answer():
    table = torch.tensor([[0.0, 0.0], [1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    traces = [{"question": "1 2", "answer": "3", "domain": "a"}, {"question": "", "answer": "3 1", "domain": "a"}]
    assert mean_pool(traces, Words(), table).tolist() == [[3.0, 30.0], [3.5, 35.0]]


def test_mean_pool_refuses_a_trace_without_tokens():
    with pytest.raises(ValueError, match="no tokens"):
        mean_pool([{"question": "", "answer": "", "domain": "a"}], Words(), torch.zeros(2, 2))


def hand_made_vae(mu, log_var):
    """A VAE whose encoder gives (mu, log_var) and whose decoder gives 0, whatever comes in; mean 1, scale 2."""
    vae = VAE(width=3, latent=2, hidden=4)
    for parameter in vae.parameters():
        parameter.data.zero_()
    vae.encoder[2].bias.data = torch.tensor([*mu, *log_var], dtype=torch.float32)
    vae.mean.fill_(1.0)
    vae.scale.fill_(2.0)
    return vae


def test_loss_by_hand():
    vae = hand_made_vae(mu=(1.0, 0.0), log_var=(0.0, math.log(4.0)))
    h = torch.tensor([[3.0, 1.0, -3.0]])                    # standardised: (1, 0, -2), squared sum 5
    reconstruction, kl, total = vae.loss(h, beta=0.5, generator=torch.Generator().manual_seed(0))
    assert reconstruction.item() == pytest.approx(5.0)
    # KL(N(1, 1) || N(0, 1)) = 1/2;  KL(N(0, 4) || N(0, 1)) = (4 - 1 - ln 4) / 2
    assert kl.tolist() == pytest.approx([0.5, (3 - math.log(4)) / 2])
    assert total.item() == pytest.approx(5 + 0.5 * (0.5 + (3 - math.log(4)) / 2))


def test_z_is_mu_plus_sigma_epsilon():
    vae = hand_made_vae(mu=(5.0, -5.0), log_var=(math.log(4.0), math.log(4.0)))
    vae.decoder[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    vae.decoder[1] = torch.nn.Identity()
    vae.decoder[2].weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]])      # decodes z to (z0, z1, 0)
    h = torch.ones(20_000, 3)                               # standardised: 0, so the reconstruction error is |z|^2
    reconstruction, _, _ = vae.loss(h, beta=0.0, generator=torch.Generator().manual_seed(0))
    assert reconstruction.item() == pytest.approx(2 * (25 + 4), rel=0.02)                           # E z^2 = mu^2 + sigma^2


def test_decoding_ends_in_the_space_of_token_embeddings():
    vae = hand_made_vae((0, 0), (0, 0))
    vae.decoder[2].bias.data = torch.tensor([1.0, 0.0, -1.0])
    assert vae.decode(torch.zeros(5, 4, 2)).shape == (5, 4, 3)
    assert vae.decode(torch.zeros(2)).tolist() == [3.0, 1.0, -1.0]                                  # output * scale + mean


def test_domain_gaussians_hold_the_moments_of_their_own_latents():
    vae = VAE(width=2, latent=2, hidden=4, domains=["a", "b"])
    vae.encode = lambda h: (h, torch.full_like(h, math.log(0.25)))                                  # mu = h, sigma^2 = 1/4
    h = torch.tensor([[0.0, 0.0], [2.0, 2.0], [10.0, 0.0], [10.0, 4.0]])
    fit_domains(vae, h, torch.tensor([0, 0, 1, 1]))
    assert vae.domain_mean.tolist() == [[1.0, 1.0], [10.0, 2.0]]
    covariances = vae.domain_factor.transpose(1, 2) @ vae.domain_factor
    torch.testing.assert_close(covariances, torch.tensor([[[2.25, 2.0], [2.0, 2.25]], [[0.25, 0.0], [0.0, 8.25]]]))


def test_a_domain_with_one_trace_is_refused():
    vae = VAE(width=2, latent=2, hidden=4, domains=["a"])
    with pytest.raises(ValueError, match="domain 'a' has 1 trace"):
        fit_domains(vae, torch.zeros(1, 2), torch.tensor([0]))


def test_training_beats_the_mean_and_a_huge_beta_shows_as_collapse(tmp_path, tokenizer, traces, model):
    table = model.get_input_embeddings().weight.detach()
    good = train_vae(traces, tokenizer, table, tmp_path / "good", epochs=30)
    figures = json.loads((tmp_path / "good" / "config.json").read_text())["report"]
    assert figures["reconstruction"] < 0.8 * figures["predict_the_mean"]
    assert figures["active_units"] == good.settings["latent"] == 8
    train_vae(traces, tokenizer, table, tmp_path / "dead", epochs=30, beta=1000.0)
    figures = json.loads((tmp_path / "dead" / "config.json").read_text())["report"]
    assert figures["active_units"] == 0
    assert figures["reconstruction"] > 0.95 * figures["predict_the_mean"]


def test_every_tenth_trace_is_held_out(tmp_path, tokenizer, traces, model):
    table = model.get_input_embeddings().weight.detach()
    changed = [{**trace, "answer": "hello room"} if i % 10 == 9 else trace for i, trace in enumerate(traces)]
    one, two = (train_vae(rows, tokenizer, table, tmp_path / name, epochs=2) for name, rows in (("a", traces), ("b", changed)))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_the_gauss_control_has_the_covariance_of_h(tmp_path, tokenizer, traces, model):
    table = model.get_input_embeddings().weight.detach()
    vae = train_vae(traces, tokenizer, table, tmp_path, epochs=1)
    h = mean_pool([trace for i, trace in enumerate(traces) if i % 10 != 9], tokenizer, table)       # every tenth is held out
    torch.testing.assert_close(vae.gauss_factor.T @ vae.gauss_factor, torch.cov(h.T), atol=1e-5, rtol=1e-3)


def test_the_same_seed_gives_the_same_vae_and_a_saved_one_comes_back(tmp_path, tokenizer, traces, model):
    table = model.get_input_embeddings().weight.detach()
    first, second = (train_vae(traces, tokenizer, table, tmp_path / name, epochs=2) for name in "ab")
    for vae in (second, VAE.load(tmp_path / "a")):
        for name, value in vae.state_dict().items():
            assert torch.equal(value, first.state_dict()[name]), name


def test_a_policy_is_recognised_by_its_embedding_table(vae, model):
    table = model.get_input_embeddings().weight.detach()
    vae.check_policy(table)
    vae.check_policy(table + 0.05 * table.std() * torch.randn(table.shape))                         # fine-tuned a little
    with pytest.raises(ValueError, match="width 128.*width 64"):
        vae.check_policy(table[:, :64])
    with pytest.raises(ValueError, match="another embedding table"):
        vae.check_policy(table.roll(1, 0))


def test_conversations_give_the_first_answered_human_turn(tmp_path):
    turns = [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"conversations": turns}) + "\n" + json.dumps({"conversations": turns[:1]}) + "\n")
    assert load_traces([f"qa={path}"], limit=1) == [{"question": "q", "answer": "a", "domain": "qa"}]
    with pytest.raises(ValueError, match="line 2: no 'answer'"):
        load_traces([f"qa={path}"])


def test_a_second_run_reuses_the_vae_and_refuses_other_settings(tmp_path, policy_folder, traces, capsys):
    path, out = tmp_path / "t.jsonl", tmp_path / "vae"
    path.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    argv = ["--model", str(policy_folder), "--traces", str(path), "--out", str(out), "--epochs", "1"]
    vae_script.main(argv)
    before = (out / "vae.safetensors").stat().st_mtime_ns
    vae_script.main(argv)
    assert (out / "vae.safetensors").stat().st_mtime_ns == before and f"using {out}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another latent .was 8, now 4."):
        vae_script.main([*argv, "--latent", "4"])
    vae_script.main([*argv, "--latent", "4", "--overwrite"])
    assert VAE.load(out).latent == 4


@pytest.mark.parametrize("content, message", [
    ('{"question": "q", "answer": "a", "domain": "x"}\n{"question": ', "line 2: not JSON"),
    ('{"question": "q", "domain": "x"}\n', "line 1: no 'answer'"),
    ('{"question": "q", "answer": "a"}\n', "line 1: no 'domain'"),
    ('[1, 2]\n', "line 1: no 'answer'"),
    ("\n\n", "no traces in it"),
])
def test_malformed_traces_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_traces([str(path)])
    assert "traces.jsonl" in str(error.value)


def test_traces_take_their_domain_from_the_flag_or_the_row_and_stop_at_the_limit(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "q", "answer": "a", "domain": "own"}\n' * 5)
    assert [trace["domain"] for trace in load_traces([f"math={path}"], limit=3)] == ["math"] * 3
    assert load_traces([str(path)])[0] == {"question": "q", "answer": "a", "domain": "own"}
    with pytest.raises(ValueError, match="no such file: nowhere.jsonl"):
        load_traces(["math=nowhere.jsonl"])


def test_unicode_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "c\u0085d", "domain": "x"}\n', encoding="utf-8")
    assert load_traces([str(path)])[0]["question"] == "a\u2028b"
    path.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON.*utf-8"):
        load_traces([str(path)])


def test_a_missing_or_damaged_vae_is_one_sentence(tmp_path, tokenizer, traces, model):
    with pytest.raises(ValueError, match="no VAE in"):
        VAE.load(tmp_path)
    train_vae(traces, tokenizer, model.get_input_embeddings().weight.detach(), tmp_path, epochs=1)
    weights = tmp_path / "vae.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        VAE.load(tmp_path)


def test_pca_finds_the_long_axis():
    along = torch.linspace(-3, 3, 50)
    points = torch.stack([along, 2 * along, 0.01 * torch.sin(along * 9)], 1) + 7
    projected = pca(points, 1)[:, 0]
    torch.testing.assert_close(projected.abs(), along.abs() * math.sqrt(5), atol=1e-2, rtol=0)


def test_report_on_a_vae_that_carries_nothing():
    figures = report(hand_made_vae((0, 0), (0, 0)), 1 + 2 * torch.eye(3), torch.ones(4, 3))
    assert figures["reconstruction"] == figures["predict_the_mean"] == pytest.approx(1.0)
    assert figures["active_units"] == 0 and figures["kl_per_dimension"] == [0.0, 0.0]
    assert figures["token_embedding_norm"] == pytest.approx(math.sqrt(3), abs=1e-4)


# ---- flags --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="script.py")
    add_flags(parser, "group", switch=(False, "a switch"), some_numbers=([1, 2], "numbers"), words=([str], "words (default: all)", "WORD"),
              share=(0.5, "a share", 0), kind=("a", "a kind", ("a", "b")), count=(int, "a count (default: as many as fit)", 1))
    return parser


def test_flags_take_type_default_and_help_from_their_line(parser):
    assert vars(parser.parse_args([])) == dict(switch=False, some_numbers=[1, 2], words=None, share=0.5, kind="a", count=None)
    given = dict(switch=True, some_numbers=[3], words=["a b", "c"], share=1e-6, kind="b", count=4)
    assert vars(parser.parse_args(as_flags(**given))) == given
    assert as_flags(switch=False, count=None, share=0.0) == ["--share", "0.0"]
    text = " ".join(parser.format_help().split())
    for part in ("group:", "a switch (default: off)", "a share (default: 0.5)", "words (default: all)", "--words WORD [WORD ...]"):
        assert part in text


@pytest.mark.parametrize("argv, message", [
    (["--share", "-0.1"], "--share: must be at least 0 and finite, not -0.1"), (["--share", "nan"], "not nan"),
    (["--share", "inf"], "not inf"), (["--count", "0"], "--count: must be at least 1, not 0"), (["--count", "1.5"], "invalid int value"),
    (["--kind", "c"], "invalid choice: 'c'"), (["--some-numbers"], "expected at least one argument")])
def test_a_flag_that_cannot_be_right_is_one_sentence(parser, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
