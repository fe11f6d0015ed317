"""prefix.py, parts 1 and 2: loading a policy, what it is asked, and where prefixes come from."""

import math

import pytest
import torch

import evaluate
import prefix as prefix_file
from prefix import (
    SOURCES,
    Completion,
    Palette,
    PrefixConfig,
    Source,
    check_prompts,
    check_source,
    end_ids,
    load_policy,
    texts_of,
)
from vae import VAE, Reader

DRAWN = [name for name in SOURCES if name != "none"]


@pytest.fixture
def table(model):
    return model.get_input_embeddings().weight.detach()


def embeddings_of(palette, seeds):
    """[seeds, L, d]."""
    return torch.stack([palette.draw(seed).embeddings for seed in seeds])


def latents_of(palette, seeds):
    """[seeds * draws, k]."""
    return torch.cat([palette.draw(seed).latent for seed in seeds])


# ---- Draws ---------------------------------------------------------------------------------------


def test_a_prefix_has_l_rows_and_the_latents_that_made_them(vae, table):
    palette = Palette(vae, table, "prior", length=3, tiled=False)
    for prefix in (palette.draw(1), palette.draw(2)):
        assert prefix.embeddings.shape == (3, 128)
        assert prefix.latent.shape == (3, 8)


def test_noise_is_as_long_as_token_embeddings_and_has_no_latent(table):
    palette = Palette(None, table, "noise", length=4, tiled=False)
    noise = embeddings_of(palette, range(200))
    mean_norm = table.norm(dim=-1).mean().item()
    assert noise.norm(dim=-1).mean().item() == pytest.approx(mean_norm, rel=0.02)
    assert palette.draw(0).latent is None


def test_tiled_repeats_one_draw_and_independent_rows_differ(vae, table):
    tiled = Palette(vae, table, "prior", length=4).draw(0)
    assert tiled.latent.shape == (1, 8)
    for row in tiled.embeddings:
        assert torch.equal(row, tiled.embeddings[0])
    independent = Palette(vae, table, "prior", length=4, tiled=False).draw(0).embeddings
    for row in independent[1:]:
        assert not torch.equal(row, independent[0])


@pytest.mark.parametrize("source", [*DRAWN, "math"])
def test_a_prefix_depends_on_its_seed_alone(vae, table, source):
    palette = Palette(vae, table, source, length=2)
    seven, eight, _ = embeddings_of(palette, [7, 8, 9])
    assert torch.equal(palette.draw(8).embeddings, eight)
    assert not torch.equal(seven, eight)


def test_the_latent_rebuilds_the_prefix(vae, table):
    prefix = Palette(vae, table, "code", length=5, tiled=False).draw(3)
    z = prefix.latent  # [5, k]
    again = Palette(vae, table, length=5, z=z).draw(99)
    assert torch.equal(again.embeddings, prefix.embeddings)
    tiled = Palette(vae, table, length=5, z=z[0]).draw(0)
    torch.testing.assert_close(tiled.embeddings, vae.decode(z[0]).expand(5, -1))
    with pytest.raises(ValueError, match="1 or L = 5 rows, not 2"):
        Palette(vae, table, length=5, z=z[:2])


def test_domain_draws_follow_the_domain_gaussian(vae, table):
    for i, domain in enumerate(vae.domains):
        z = latents_of(Palette(vae, table, domain, length=1), range(3000))
        covariance = vae.domain_factor[i].T @ vae.domain_factor[i]
        error = covariance.diagonal().sqrt() / math.sqrt(len(z))
        assert ((z.mean(0) - vae.domain_mean[i]).abs() < 5 * error).all()
        torch.testing.assert_close(torch.cov(z.T), covariance, atol=0.15, rtol=0.15)


def test_prior_draws_are_standard_normal(vae, table):
    z = latents_of(Palette(vae, table, "prior", length=1), range(3000))
    assert (z.mean(0).abs() < 5 / math.sqrt(3000)).all()
    torch.testing.assert_close(torch.cov(z.T), torch.eye(8), atol=0.12, rtol=0)


def test_gauss_draws_have_the_mean_and_spread_of_h(vae, table):
    rows = embeddings_of(Palette(vae, table, "gauss", length=1), range(2000))[:, 0]
    spread = vae.gauss_factor.pow(2).sum(0).sqrt()
    assert ((rows.mean(0) - vae.mean).abs() < 5 * spread / math.sqrt(2000)).all()
    torch.testing.assert_close(rows.std(0), spread, rtol=0.1, atol=1e-4)


def test_the_mixture_takes_every_domain_about_equally_often(vae, table):
    z = latents_of(Palette(vae, table, "mixture", length=1), range(600))
    nearest = torch.cdist(z, vae.domain_mean).argmin(1)
    shares = nearest.bincount(minlength=3) / 600
    assert ((shares - 1 / 3).abs() < 0.12).all(), shares


def test_shuffled_latents_keep_their_entries_and_lose_their_domain(vae, table):
    seeds = range(300)
    shuffled = Palette(vae, table, "shuffled", length=1)
    mixture = Palette(vae, table, "mixture", length=1)
    z = latents_of(shuffled, seeds)  # [300, k]
    origin = latents_of(mixture, seeds)
    assert torch.equal(z.sort().values, origin.sort().values)
    assert (z != origin).any(1).all()

    domains = [shuffled.draw(seed).domain for seed in seeds]
    assert domains == [mixture.draw(seed).domain for seed in seeds]
    number = torch.tensor([vae.domains.index(domain) for domain in domains])
    nearest = torch.cdist(origin, vae.domain_mean).argmin(1)
    nearest_shuffled = torch.cdist(z, vae.domain_mean).argmin(1)
    assert (nearest == number).float().mean() > 0.95
    assert (nearest_shuffled == number).float().mean() < 0.5


@pytest.mark.parametrize(
    "source, domain", [("math", "math"), ("prior", None), ("gauss", None), ("noise", None)]
)
def test_a_latent_names_the_domain_that_it_comes_from(vae, table, source, domain):
    assert Palette(vae, table, source).draw(3).domain == domain


def test_no_prefix_at_length_zero_and_for_source_none(vae, table):
    for palette in (Palette(vae, table, "prior", length=0), Palette(None, table, "none")):
        prefix = palette.draw(1)
        assert prefix.embeddings is None
        assert prefix.latent is None


# ---- Sources -------------------------------------------------------------------------------------


def test_a_new_source_is_one_function_and_one_entry(vae, table, monkeypatch):
    """The blend of two domains' latents: the palette, the checks and evaluate.py's arms know it."""

    def draw_blend(palette, seed, draws):
        first = prefix_file.draw_domain(palette, seed, draws, "math")
        second = prefix_file.draw_domain(palette, seed, draws, "code")
        return palette.decode((first.latent + second.latent) / 2)

    with pytest.raises(ValueError, match="unknown prefix source 'blend'"):
        check_source("blend", vae.domains)
    monkeypatch.setitem(SOURCES, "blend", Source(draw_blend, arm="blend"))
    check_source("blend", vae.domains)

    prefix = Palette(vae, table, "blend", length=2).draw(5)
    math_z = Palette(vae, table, "math").draw(5).latent
    code_z = Palette(vae, table, "code").draw(5).latent
    torch.testing.assert_close(prefix.latent, (math_z + code_z) / 2)
    torch.testing.assert_close(prefix.embeddings, vae.decode(prefix.latent).expand(2, -1))
    with pytest.raises(ValueError, match="'blend' needs a VAE"):
        Palette(None, table, "blend")

    arms = evaluate.arms_of(vae.domains, temperature=0.7)
    assert arms["blend"].source == arms["blend + sampling"].source == "blend"
    assert "blend" not in evaluate.arms_of([], temperature=0.7, with_vae=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": -1}, "0 or more, not -1"),
        ({"source": "poetry"}, "unknown prefix source 'poetry'.*math"),
    ],
)
def test_bad_requests_are_one_sentence(vae, table, options, message):
    with pytest.raises(ValueError, match=message):
        Palette(vae, table, **options)


def test_sources_that_need_a_vae_say_so_and_a_foreign_one_is_refused(vae, table):
    with pytest.raises(ValueError, match="needs a VAE"):
        Palette(None, table, "prior")
    with pytest.raises(ValueError, match="another embedding table"):
        Palette(vae, torch.randn(500, 128))


# ---- The policy, and what it is asked ------------------------------------------------------------


def test_end_tokens_come_from_the_configuration_and_the_tokenizer(model, tokenizer):
    assert end_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [7, 9]
    assert end_ids(model, tokenizer) == [1, 7, 9]


def test_the_chat_template_names_an_end_token_and_a_model_without_any_is_refused(model):
    class ChatTokenizer:
        eos_token_id = None
        chat_template = "yes"
        all_special_ids = [50, 51]

        def apply_chat_template(self, messages, tokenize):
            return "<user>Q<assistant>A<|im_end|> more"

        def __call__(self, text, add_special_tokens):
            assert text == "<|im_end|> more"
            return {"input_ids": [51, 2]}

    tokenizer = ChatTokenizer()
    model.generation_config.eos_token_id = [7, 9]
    assert end_ids(model, tokenizer) == [7, 9, 51]
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    tokenizer.all_special_ids = []
    with pytest.raises(ValueError, match="names no end token"):
        end_ids(model, tokenizer)


def test_unknown_models_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot load the model"):
        load_policy(str(tmp_path))


def test_a_run_folder_stands_for_its_finished_policy(tmp_path, policy_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "policy").symlink_to(policy_folder)
    model, reader = load_policy(str(tmp_path / "run"))
    assert not model.training
    assert reader.tokenizer.eos_token == "<end>"


@pytest.mark.parametrize(
    "question, refused",
    [
        ("calc 7 + 2 - 3 ?", False),
        ("calc apples + 2 ?", False),  # one of five is unknown
        ("calc apples + pears ?", False),  # two of five
        ("apples calc", False),  # just half
        ("Was ist die Summe von 17 und 25?", True),
        ("A box holds 12 pens. How many pens are in 3 boxes?", True),
    ],
)
def test_questions_of_mostly_unknown_tokens_are_refused(reader, question, refused):
    """Counted on the question alone: the template and the instruction are known words."""
    rows = [{"question": "calc 1 + 1 ?"}, {"question": question}]
    if not refused:
        check_prompts(rows, reader, " calc" * 50, "auto")
        return
    with pytest.raises(ValueError, match="tokens of a question are unknown to this model"):
        check_prompts(rows, reader, " calc" * 50, "auto")


def test_a_tokenizer_without_an_unknown_token_knows_every_question():
    class Letters:
        unk_token_id = None
        chat_template = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(letter) for letter in text]}

    check_prompts([{"question": "Was ist das?"}], Reader(Letters()), "", "auto")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"room": 10, "positions": 16}, "7 tokens of a prompt and 10 beside .* the 16 positions"),
    ],
)
def test_prompts_that_are_too_long_are_refused(reader, options, message):
    rows = [{"question": "calc 7 + 2 ?"}]
    check_prompts(rows, reader, "", "auto", room=10, positions=17)
    with pytest.raises(ValueError, match=message):
        check_prompts(rows, reader, "", "auto", **options)


def test_an_image_for_a_model_of_text_is_refused(reader):
    with pytest.raises(ValueError, match="reads text only"):
        check_prompts([{"question": "calc 7 ?", "image": "a.png"}], reader, "", "auto")


def test_completions_end_at_the_first_stop_string():
    class Letters:
        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return "".join(chr(i) for i in ids if i)

    def completion_of(text):
        ids = [ord(letter) for letter in text]
        return Completion(ids + [0], [-1.0] * (len(text) + 1), "stop")

    cut_short = Completion([ord("|")], [-2.0], "length")
    completions = [completion_of("ab|c|d"), completion_of("abc"), cut_short, completion_of("|d")]
    completions, texts = texts_of(completions, Letters(), ("|", "zz"))
    assert texts == ["ab", "abc", "", ""]
    assert [len(completion.ids) for completion in completions] == [3, 4, 1, 1]
    assert [len(completion.logprobs) for completion in completions] == [3, 4, 1, 1]
    assert [completion.finish for completion in completions] == ["stop"] * 4


# ---- The demonstration ---------------------------------------------------------------------------


def test_the_demonstration_answers_under_every_source(vae, policy_folder, tmp_path, capsys):
    vae.save(tmp_path / "vae")
    assert VAE.load(tmp_path / "vae").domains == vae.domains
    flags = ["--model", str(policy_folder), "--vae", str(tmp_path / "vae")]
    flags += ["--prompt", "calc 7 + 2 ?", "--draws", "2", "--max-new-tokens", "4"]
    prefix_file.main(flags)
    question, *answers = capsys.readouterr().out.splitlines()
    assert "calc 7 + 2 ?" in question
    shown = [answer.split(":")[0].strip() for answer in answers]
    expected = ["none"]  # greedy without prefix: once
    for source in [*vae.domains, "prior", "noise"]:
        expected += [source, source]
    assert shown == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"draws": 0}, "--draws must be at least 1"),
        ({"model": "some/model", "source": ["none"]}, "--prompt is missing"),
    ],
)
def test_bad_settings_of_the_demonstration_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixConfig(**options)
