"""prefix.py, part 1: where prefixes come from, and loading a policy."""
import math

import pytest
import torch

from prefix import Completion, Palette, end_ids, load_policy, texts_of


@pytest.fixture
def table(model):
    return model.get_input_embeddings().weight.detach()


def test_shapes_and_the_norm_of_noise(vae, table):
    rows, latents = Palette(vae, table, "prior", length=3, tiled=False).draw([1, 2])
    assert [row.shape for row in rows] == [(3, 128)] * 2 and [z.shape for z in latents] == [(3, 8)] * 2
    noise, latents = Palette(None, table, "noise", length=4, tiled=False).draw(range(200))
    assert latents[0] is None
    assert torch.stack(noise).norm(dim=-1).mean().item() == pytest.approx(table.norm(dim=-1).mean().item(), rel=0.02)


def test_tiled_repeats_one_draw_and_independent_rows_differ(vae, table):
    (tiled,), (z,) = Palette(vae, table, "prior", length=4).draw([0])
    assert z.shape == (1, 8) and all(torch.equal(tiled[0], row) for row in tiled)
    (free,), _ = Palette(vae, table, "prior", length=4, tiled=False).draw([0])
    assert all(not torch.equal(free[0], row) for row in free[1:])


@pytest.mark.parametrize("source", ["prior", "mixture", "shuffled", "noise", "gauss", "math"])
def test_a_prefix_depends_on_its_seed_alone(vae, table, source):
    palette = Palette(vae, table, source, length=2)
    many, (one,) = palette.draw([7, 8, 9])[0], palette.draw([8])[0]
    assert torch.equal(many[1], one) and not torch.equal(many[0], one)


def test_the_latent_rebuilds_the_prefix(vae, table):
    (rows,), (z,) = Palette(vae, table, "code", length=5, tiled=False).draw([3])
    (again,), _ = Palette(vae, table, length=5, z=z).draw([99])
    assert torch.equal(rows, again)
    (tiled,), _ = Palette(vae, table, length=5, z=z[0]).draw([0])
    torch.testing.assert_close(tiled, vae.decode(z[0]).expand(5, -1))
    with pytest.raises(ValueError, match="1 or L = 5 rows, not 2"):
        Palette(vae, table, length=5, z=z[:2]).draw([0])


def test_domain_draws_follow_the_domain_gaussian(vae, table):
    for i, domain in enumerate(vae.domains):
        z = torch.cat(Palette(vae, table, domain, length=1).draw(range(3000))[1])
        covariance = vae.domain_factor[i].T @ vae.domain_factor[i]
        spread = covariance.diagonal().sqrt() / math.sqrt(len(z))
        assert ((z.mean(0) - vae.domain_mean[i]).abs() < 5 * spread).all()
        torch.testing.assert_close(torch.cov(z.T), covariance, atol=0.15, rtol=0.15)


def test_gauss_draws_have_the_mean_and_spread_of_h(vae, table):
    rows = torch.cat(Palette(vae, table, "gauss", length=1).draw(range(2000))[0])
    expected = vae.gauss_factor.pow(2).sum(0).sqrt()
    assert ((rows.mean(0) - vae.mean).abs() < 5 * expected / math.sqrt(2000)).all()
    torch.testing.assert_close(rows.std(0), expected, rtol=0.1, atol=1e-4)


def test_the_mixture_takes_every_domain_about_equally_often(vae, table):
    z = torch.cat(Palette(vae, table, "mixture", length=1).draw(range(600))[1])
    nearest = torch.cdist(z, vae.domain_mean).argmin(1).bincount(minlength=3) / 600
    assert ((nearest - 1 / 3).abs() < 0.12).all(), nearest


def test_end_tokens_come_from_model_tokenizer_and_chat_template(model, tokenizer):
    assert end_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [7, 9]
    assert end_ids(model, tokenizer) == [1, 7, 9]

    class Template:
        eos_token_id, chat_template, all_special_ids = None, "yes", [50, 51]

        def apply_chat_template(self, messages, tokenize):
            return "<user>Q<assistant>A<|im_end|> more"

        def __call__(self, text, add_special_tokens):
            assert text == "<|im_end|> more"
            return {"input_ids": [51, 2]}

    assert end_ids(model, Template()) == [7, 9, 51]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    Template.all_special_ids = []
    with pytest.raises(ValueError, match="names no end token"):
        end_ids(model, Template())


def test_no_prefix_at_length_zero_and_for_source_none(vae, table):
    assert Palette(vae, table, "prior", length=0).draw([1, 2]) == ([None, None], [None, None])
    assert Palette(None, table, "none").draw([1]) == ([None], [None])


@pytest.mark.parametrize("arguments, message", [
    (dict(length=-1), "0 or more, not -1"), (dict(source="poetry"), "unknown prefix source 'poetry'.*math"),
])
def test_bad_requests_are_one_sentence(vae, table, arguments, message):
    with pytest.raises(ValueError, match=message):
        Palette(vae, table, **arguments)


def test_sources_that_need_a_vae_say_so_and_a_foreign_one_is_refused(vae, table):
    with pytest.raises(ValueError, match="needs a VAE"):
        Palette(None, table, "prior")
    with pytest.raises(ValueError, match="another embedding table"):
        Palette(vae, torch.randn(500, 128))


def test_unknown_models_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot load the model"):
        load_policy(str(tmp_path))


def test_a_run_folder_stands_for_its_finished_policy(tmp_path, policy_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "policy").symlink_to(policy_folder)
    model, tokenizer = load_policy(str(tmp_path / "run"))
    assert not model.training and tokenizer.eos_token == "<end>"


def test_completions_end_at_the_first_stop_string():
    class Letters:
        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return "".join(chr(i) for i in ids if i)

    of = lambda text: Completion([ord(c) for c in text] + [0], [-1.0] * (len(text) + 1), "stop")
    completions, texts = texts_of([of("ab|c|d"), of("abc"), Completion([ord("|")], [-2.0], "length"), of("|d")],
                                  Letters(), ("|", "zz"))
    assert texts == ["ab", "abc", "", ""]
    assert [len(c.ids) for c in completions] == [len(c.logprobs) for c in completions] == [3, 4, 1, 1]
    assert [c.finish for c in completions] == ["stop"] * 4


def test_shuffled_latents_keep_their_entries_and_lose_their_domain(vae, table):
    shuffled, mixture = (Palette(vae, table, source, length=1) for source in ("shuffled", "mixture"))
    seeds = range(300)
    z, origin = torch.cat(shuffled.draw(seeds)[1]), torch.cat(mixture.draw(seeds)[1])             # [300, k] each
    assert torch.equal(z.sort().values, origin.sort().values) and (z != origin).any(1).all()
    assert [shuffled.domain_of(seed) for seed in seeds] == [mixture.domain_of(seed) for seed in seeds]
    domain = torch.tensor([vae.domains.index(shuffled.domain_of(seed)) for seed in seeds])
    nearest = lambda latents: torch.cdist(latents, vae.domain_mean).argmin(1)
    assert (nearest(origin) == domain).float().mean() > 0.95 and (nearest(z) == domain).float().mean() < 0.5


def test_a_latent_comes_from_the_domain_that_is_named_or_from_none(vae, table):
    assert [Palette(vae, table, source).domain_of(3) for source in ("math", "prior", "gauss")] == ["math", None, None]
    assert Palette(None, table, "noise").domain_of(3) is None
