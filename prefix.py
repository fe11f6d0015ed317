"""The policy under a prefix: latent -> prefix, prefix -> rollout, rollout -> log-probs (Sec. 3.3).

A row is everywhere [prefix | prompt | completion | pads]: L prefix embeddings (any L per row, also
0), then embedded tokens. The prefix stands right before the prompt, never before pads, and position
0 is the row's first column. In part 3 a plain decoder stands before the fast one: read it first.

Departs from the paper: "tiled" (one latent repeated L times) is our default of the two readings of
Eq. 9, `--independent` the other; in the tiny world pass@8 of the latent arm is the same.

Run it (greedy answers to one question under several latents):
    python prefix.py                          # the tiny world; makes what is missing
    python prefix.py --model tiny-vl                                   # a drawn scene
    python prefix.py --model Qwen/Qwen3-0.6B --vae runs/qwen/vae --prompt "What is 17 * 23?"
"""

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.hf_argparser import HfArg
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import rewards
import vae as vae_stage
from vae import VAE, Pixels, load_model, load_reader, see_images

# --------------------------------------------------------------------------------------------------
# 1. The policy, and what it is asked

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How the tokenizers of Qwen-VL models spell an image: one IMAGE for every visual token
VISION_START, IMAGE, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


def load_policy(name, device="cpu", dtype=torch.float32):
    """(model, reader) of a hub name, folder, finished run or world; ValueError if there is none.

    Eval mode, and a frozen vision tower: our choice, as the VAE has learnt what it makes of images.
    """
    folder = rewards.find_model(name)
    reader = load_reader(folder)
    model = load_model(folder, dtype).to(device).eval()
    if sees_images(model):
        model.model.visual.requires_grad_(False)
    return model, reader


def sees_images(model):
    """Whether a model has a vision tower beside the transformer that reads embeddings."""
    return hasattr(getattr(model, "model", None), "visual")


def text_model(model):
    """The transformer that reads embeddings."""
    return model.model.language_model if sees_images(model) else model.model


def unshard(weight):
    """A weight as a plain tensor: gathered, by all ranks at once, where `--fsdp` has sharded it."""
    if not hasattr(weight, "full_tensor"):
        return weight
    # late: half a second that a single process does not need
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial()])


def end_ids(model, tokenizer):
    """All token ids that end a completion, sorted; ValueError if there is none.

    The configuration's, the tokenizer's end token, which the warm-up trains, and the special token
    that the chat template writes after an assistant's turn (a base Qwen names only the first).
    """
    ends = set(config_end_ids(model))
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        _, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("A")
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in tokenizer.all_special_ids:
            ends.add(ids[0])
    if not ends:
        raise ValueError("this model names no end token: set eos_token in its tokenizer")
    return sorted(ends)


def config_end_ids(model):
    """The end tokens of generation_config, else those of config; a list, which may be empty."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    if isinstance(ends, int):
        return [ends]
    return list(ends or ())


@dataclass
class Prompt:
    """What is asked."""

    ids: list[int]  # at least one token
    image: Pixels | None = None  # its n patches, merged m x m, are n / m^2 of the tokens, in a row


def prompt_of(row, reader, instruction="", style="auto"):
    """The Prompt of a task row or trace {question[, image]}; the image stands before the text.

    instruction, style: as in rewards.prompt_ids. ValueError for an image that cannot be read.
    """
    question = row["question"]
    image = None
    if row.get("image") is not None:
        image = reader.read_image(row["image"])
        tokens = math.prod(image.grid) // reader.image_processor.merge_size**2
        question = f"{VISION_START}{IMAGE * tokens}{VISION_END}{question}"
    return Prompt(rewards.prompt_ids(question, reader.tokenizer, instruction, style), image)


def check_prompts(rows, reader, instruction, prompt_style, room=0, positions=None):
    """ValueError for a task row that the model cannot read: before a run, not in it.

    Over half of a question's tokens must be known to the tokenizer. positions: of the model, which
    prompt and room (length + max_new_tokens) share; None: any number.
    """
    for row in rows:
        question = repr(row["question"][:80])
        words = reader.tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        unknown = words.count(reader.tokenizer.unk_token_id)
        if 2 * unknown > len(words):
            problem = f"are unknown to this model's tokenizer: {question}"
            raise ValueError(f"{unknown} of the {len(words)} tokens of a question {problem}")
        length = len(prompt_of(row, reader, instruction, prompt_style).ids)
        if positions is not None and length + room > positions:
            problem = f"are more than the {positions} positions of this model: {question}"
            raise ValueError(f"{length} tokens of a prompt and {room} beside it {problem}")


# --------------------------------------------------------------------------------------------------
# 2. The palette: where prefixes come from


@dataclass
class Prefix:
    """What stands before a prompt, and how it was made."""

    embeddings: torch.Tensor | None = None  # [L, d]; None: no prefix
    latent: torch.Tensor | None = None  # the z that was decoded, [draws, k]; None where none was
    domain: str | None = None  # whose Gaussian z is from; None if it is from none


@dataclass(frozen=True)
class Source:
    """A way to make prefixes. A new one needs its function and its entry in SOURCES, no more."""

    draw: Callable  # (palette, seed, draws) -> Prefix, a pure function of the seed
    needs_vae: bool = True  # whether it reads palette.vae; without, a draw is one row
    arm: str | None = None  # its name among the arms of evaluate.py; None: it is none
    with_sampling: bool = True  # whether it is also an arm in which tokens are sampled


def generator_of(seed):
    """A random number generator on the CPU: the same numbers for every device."""
    return torch.Generator().manual_seed(seed)


def draw_noise(palette, seed, draws):
    """Control: Gaussian rows as long as token embeddings, E|row| = mean |token|. Our choice."""
    std = palette.token_norm / math.sqrt(palette.width)
    rows = torch.randn(draws, palette.width, generator=generator_of(seed)) * std  # [draws, d]
    return Prefix(rows)


def draw_gauss(palette, seed, draws):
    """Control: rows of a Gaussian fitted to h, the VAE's training data; no decoder. Our choice."""
    factor = palette.vae.gauss_factor  # [rank, rows * d]
    noise = torch.randn(draws, len(factor), generator=generator_of(seed))  # [draws, rank]
    return Prefix(palette.vae.mean + noise @ factor)  # [draws, rows * d]


def draw_prior(palette, seed, draws):
    """z ~ N(0, I), the VAE's prior (Eq. 9)."""
    z = torch.randn(draws, palette.vae.latent, generator=generator_of(seed))  # [draws, k]
    return palette.decode(z)


def draw_domain(palette, seed, draws, domain):
    """z of the Gaussian fitted to the latents of one domain (Sec. 3.2)."""
    z = domain_latents(palette.vae, domain, draws, generator_of(seed))  # [draws, k]
    return palette.decode(z, domain)


def draw_mixture(palette, seed, draws):
    """z of one domain's Gaussian; the seed picks the domain, each equally often."""
    domain = random.Random(seed).choice(palette.vae.domains)
    return draw_domain(palette, seed, draws, domain)


def draw_shuffled(palette, seed, draws):
    """Control: z of draw_mixture with its entries in random order, so another z. Our choice."""
    domain = random.Random(seed).choice(palette.vae.domains)
    generator = generator_of(seed)
    z = domain_latents(palette.vae, domain, draws, generator)  # [draws, k]
    order = torch.randperm(z.shape[1], generator=generator)
    return palette.decode(z[:, order], domain)


def domain_latents(vae, domain, draws, generator):
    """z [draws, k] of a domain's Gaussian."""
    number = vae.domains.index(domain)
    noise = torch.randn(draws, vae.latent, generator=generator)  # [draws, k]
    return vae.domain_mean[number] + noise @ vae.domain_factor[number]


# Beside these, every domain of the VAE is a source by its own name.
SOURCES = {
    "none": Source(draw=None, needs_vae=False),  # never drawn from: L is 0
    "noise": Source(draw_noise, needs_vae=False, arm="noise"),
    "gauss": Source(draw_gauss, arm="gauss"),
    "shuffled": Source(draw_shuffled, arm="shuffled", with_sampling=False),
    "prior": Source(draw_prior, arm="latent"),
    "mixture": Source(draw_mixture),
}


def needs_vae(source):
    """Whether prefixes of this source are made by a VAE: a domain's are."""
    return source not in SOURCES or SOURCES[source].needs_vae


def check_source(source, domains):
    """ValueError for a prefix source that there is not. domains: the names of the VAE's."""
    names = [*SOURCES, *domains]
    if source not in names:
        raise ValueError(f"unknown prefix source '{source}': choose one of {', '.join(names)}")


class Palette:
    """Draws prefixes of one source (Eq. 9). A prefix is a function of its seed alone.

    source: a name of SOURCES, or of one of the VAE's domains. length: L, rows per prefix.
    tiled: one draw repeated to L rows, else as many independent draws as fill them. A draw makes
        one row, through a GPT decoder 8: at L = 8 a prefix is one draw then, either way.
    z: a fixed latent, [k] or [L, k], instead of a draw.
    table: the policy's embedding table [V, d]; the VAE must have been trained on it.
    """

    def __init__(self, vae, table, source="prior", length=8, tiled=True, z=None):
        if length < 0:
            raise ValueError(f"the prefix length L must be 0 or more, not {length}")
        check_source(source, [] if vae is None else vae.domains)
        if needs_vae(source) and vae is None:
            raise ValueError(f"the prefix source '{source}' needs a VAE: train one with vae.py")
        if vae is not None:
            vae.check_policy(table)

        self.vae = vae
        self.source = source
        self.length = 0 if source == "none" else length
        self.tiled = tiled
        self.width = table.shape[1]
        self.device = table.device
        self.token_norm = table.float().norm(dim=-1).mean().item()
        rows_per_draw = vae.rows_per_z if needs_vae(source) else 1
        self.draws_to_fill = math.ceil(self.length / rows_per_draw)
        self.z = None if z is None else z.view(-1, vae.latent)
        if z is not None and len(self.z) not in (1, self.draws_to_fill):
            raise ValueError(f"a fixed z must have 1 or L = {length} rows, not {len(self.z)}")

    @torch.no_grad()
    def draw(self, seed, z=None):
        """The Prefix of a seed, or of latents z [draws, k]; an empty one where L is 0."""
        if self.length == 0:
            return Prefix()
        draws = 1 if self.tiled else self.draws_to_fill
        z = self.z if z is None else z
        if z is not None:
            prefix = self.decode(z)
        elif self.source in SOURCES:
            prefix = SOURCES[self.source].draw(self, seed, draws)
        else:
            prefix = draw_domain(self, seed, draws, self.source)
        rows = prefix.embeddings.view(-1, self.width)  # [draws * rows per draw, d]
        times = math.ceil(self.length / len(rows))
        embeddings = rows.repeat(times, 1)[: self.length]  # [L, d]
        return replace(prefix, embeddings=embeddings.to(self.device))

    def decode(self, z, domain=None):
        """Latents z [draws, k] -> the Prefix that the VAE makes of them, not yet L rows long."""
        return Prefix(self.vae.decode(z), z, domain)


# --------------------------------------------------------------------------------------------------
# 3. Rows, and the decoders that continue them


@dataclass
class Row:
    """What the model reads before a completion."""

    prefix: torch.Tensor  # [L, d]
    prompt: torch.Tensor  # [P, d], visual tokens included; rows of one prompt share the tensor
    positions: torch.Tensor | None  # rotary positions [3, L + P]; None: of a text model
    key: tuple  # equal for equal rows, which are prefilled once
    length: int  # L + P


def embed_rows(model, table, prompts, prefixes):
    """Prompts, and a prefix [L, d] or None for each -> Rows, in the dtype of the table.

    table: the embedding table [V, d], which may be another copy than the model's own.
    """
    prefixes = check_rows(model, prompts, prefixes)
    contents = [(tuple(prompt.ids), image_key(prompt.image)) for prompt in prompts]
    distinct = dict(zip(contents, prompts))
    ids = [prompt.ids for prompt in distinct.values()]
    embedded = dict(zip(distinct, embed_tokens(model, table, ids, distinct.values())))
    rows = []
    for content, prompt, prefix in zip(contents, prompts, prefixes):
        positions = None
        if sees_images(model):
            positions = rotary_positions(model, prompt, len(prefix)).to(table.device)
        key = (*content, prefix.detach().float().cpu().numpy().tobytes())
        length = len(prefix) + len(prompt.ids)
        rows.append(Row(prefix.to(table.dtype), embedded[content], positions, key, length))
    return rows


def check_rows(model, prompts, prefixes):
    """One prefix [L, d] per prompt, with L = 0 for None; ValueError for what does not fit."""
    weight = model.get_input_embeddings().weight  # [V, d]
    if prefixes is None:
        prefixes = [None] * len(prompts)
    if len(prompts) != len(prefixes):
        raise ValueError(f"there are {len(prompts)} prompts and {len(prefixes)} prefixes")
    tensors = []
    for number, (prompt, prefix) in enumerate(zip(prompts, prefixes)):
        if len(prompt.ids) == 0:
            raise ValueError(f"prompt {number} is empty: a row needs a token after its prefix")
        if sees_images(model):
            check_image(model.config, number, prompt)
        if prefix is None:
            prefix = torch.zeros(0, weight.shape[1])
        if prefix.dim() != 2 or prefix.shape[1] != weight.shape[1]:
            needed = f"[L, {weight.shape[1]}]"
            raise ValueError(f"prefix {number} has shape {list(prefix.shape)}, not {needed}")
        tensors.append(prefix.to(weight.device, weight.dtype))
    return tensors


def check_image(config, number, prompt):
    """ValueError for a prompt whose image tokens are not those of its image."""
    needed = 0
    if prompt.image is not None:
        needed = math.prod(prompt.image.grid) // config.vision_config.spatial_merge_size**2
    count = prompt.ids.count(config.image_token_id)
    if count != needed or prompt.ids[-1] == config.image_token_id:
        raise ValueError(f"prompt {number} has {count} image tokens, its image makes {needed}")


def image_key(image):
    """A hash of an image's pixels, which is its identity; no bytes for None."""
    if image is None:
        return b""
    return hashlib.sha256(image.patches.numpy().tobytes() + repr(image.grid).encode()).digest()


def embed_tokens(model, table, ids, prompts):
    """Token lists that start with the prompts -> embeddings, one [T, d] a list, by one look-up.

    What the vision tower sees in a prompt's image stands where its image tokens are; an image token
    behind the prompt, which the policy wrote itself, is a token like any other.
    """
    tokens = torch.tensor(list(chain(*ids)), dtype=torch.long, device=table.device)
    embedded = list(F.embedding(tokens, table).split([len(row) for row in ids]))
    visual = {}  # image -> [n, d]: one that prompts share is seen once
    for number, prompt in enumerate(prompts):
        if prompt.image is None:
            continue
        if prompt.image not in visual:
            visual[prompt.image] = see_images(model, [prompt.image])[0].to(table)
        seen = visual[prompt.image]
        start = prompt.ids.index(model.config.image_token_id)
        x = embedded[number]  # [T, d]
        embedded[number] = torch.cat([x[:start], seen, x[start + len(seen) :]])
    return embedded


def rotary_positions(model, prompt, length, new=0):
    """Rotary positions [3, L + P + new] (time, height, width) of [prefix | prompt | new tokens].

    Text behind an image of h x w visual tokens goes on max(h, w) further, which is less than their
    number: it lags its columns (Qwen2-VL, arXiv 2409.12191, Sec. 2.1).
    """
    if prompt.image is None:
        return torch.arange(length + len(prompt.ids) + new).expand(3, -1)
    ids = torch.tensor([prompt.ids])  # [1, P]
    grid = torch.tensor([prompt.image.grid])
    is_image = (ids == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids, is_image, image_grid_thw=grid)  # [3, 1, P]
    of_prefix = torch.arange(length).expand(3, -1)
    of_prompt = length + positions[:, 0]
    of_new = of_prompt.max() + 1 + torch.arange(new).expand(3, -1)
    return torch.cat([of_prefix, of_prompt, of_new], 1)


def pad_positions(positions):
    """Rotary positions [3, T_i] of several rows -> [3, n, T], padded with zeros."""
    transposed = [row.T for row in positions]  # [T_i, 3]
    return torch.nn.utils.rnn.pad_sequence(transposed).permute(2, 1, 0)  # from [T, n, 3]


def micro_batches(lengths, max_tokens):
    """Row numbers, longest first; rows x longest <= max_tokens: [3, 9, 4], 9 -> [[1], [2, 0]]."""
    groups = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not groups or (len(groups[-1]) + 1) * longest > max_tokens:
            groups.append([])
            longest = lengths[number]
        groups[-1].append(number)
    return groups


DROPPED = -1e30  # logit of a filtered token: its exp is 0 and, unlike with -inf, 0 * it is no NaN


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the temperature, then the filters top-k and top-p."""

    temperature: float = 1.0  # 0: greedy, and unfiltered
    top_p: float = 1.0  # keep the likeliest tokens until they sum to it
    top_k: int = 0  # keep so many of the likeliest; 0: all
    max_new_tokens: int = 256

    def __post_init__(self):
        in_range = self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0
        if not in_range or self.max_new_tokens < 1:
            needed = "temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_new_tokens >= 1"
            raise ValueError(f"{self} is out of range: {needed}")


@dataclass
class Completion:
    """What the model wrote."""

    ids: list[int]  # with the end token where there is one
    logprobs: list[float]  # of the distribution each was drawn from; greedy: at temperature 1
    finish: str  # "stop": an end token; "length": max_new_tokens


def uniform(seed, index):
    """Uniform numbers in [0, 1) from int64 tensors, which broadcast: splitmix64 (Steele 2014)."""

    def shift_right(z, bits):
        return (z >> bits) & (2 ** (64 - bits) - 1)  # the mask drops the copies of the sign bit

    def mix(z):  # products of int64 wrap around, so factors are meant modulo 2**64
        z = (z ^ shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
        z = (z ^ shift_right(z, 27)) * (0x94D049BB133111EB - 2**64)
        return z ^ shift_right(z, 31)

    z = mix(mix(seed) + index * (0x9E3779B97F4A7C15 - 2**64))
    low_bits = z & (2**23 - 1)  # not 24: in fp32, u * total < total even if total exceeds 1
    return low_bits.float() * 2.0**-23


def shape_logits(logits, sampling, chosen=None):
    """Logits [N, V] -> fp32 logits [N, V] of the distribution that is sampled.

    Filtered tokens get DROPPED. chosen [N]: the tokens that were sampled; they are kept even if
    rounding has moved them across a filter's border.
    """
    z = logits.float()
    if sampling.temperature not in (0, 1):
        z = z / sampling.temperature
    if sampling.temperature == 0 or (sampling.top_k == 0 and sampling.top_p == 1):
        return z

    k = z.shape[1]
    if sampling.top_k > 0:
        k = min(sampling.top_k, k)
    ranked = z.topk(k).values  # [N, k], falling
    probs = ranked.softmax(-1)
    likelier = probs.cumsum(-1) - probs  # probability of all tokens before this one
    keep = likelier < sampling.top_p  # true, ..., true, false, ..., false
    last_kept = keep.sum(-1, keepdim=True) - 1  # [N, 1]
    drop = z < ranked.gather(1, last_kept)  # [N, V]
    if chosen is not None:
        drop = drop.scatter(1, chosen[:, None], False)
    return z.masked_fill(drop, DROPPED)


def sample(logits, u, sampling):
    """Logits [N, V], uniform numbers u [N] -> tokens [N], log-probs [N], by the inverse CDF."""
    probs = shape_logits(logits, sampling).softmax(-1)  # [N, V]
    if sampling.temperature == 0:
        token = logits.argmax(-1, keepdim=True)  # [N, 1]
    else:
        token = invert_cdf(probs, probs.cumsum(-1), u)
    return token[:, 0], probs.gather(1, token)[:, 0].log()


def invert_cdf(probs, cdf, u):
    """The first token [N, 1] whose cdf [N, V] is above u [N] times its end; its probability is > 0.

    A sum in parallel rounds apart, so that a GPU's cdf may rise, or fall, over tokens that cannot
    be drawn. A CPU adds from left to right.
    """
    if cdf.device.type != "cpu":
        cdf = rising(probs, cdf)
    threshold = u[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True)


def rising(probs, cdf):
    """A cdf [N, V] that never falls, and stands still where the probability is 0."""
    return cdf.masked_fill(probs == 0, 0).cummax(-1).values


@torch.no_grad()
def generate_plainly(model, rows, sampling, seeds, eos_ids):
    """One Completion a Row, in the plainest way: what Decoder.generate must give.

    For every row and every new token, the whole row so far goes through the Hugging Face module; no
    cache, no batch. Token i of a row is picked by uniform(its seed, i).
    """
    completions = []
    for row, seed in zip(rows, seeds):
        x = torch.cat([row.prefix, row.prompt])[None]  # [1, L + P, d]
        positions = None
        if row.positions is not None:
            positions = row.positions[:, None]  # [3, 1, L + P]
        completion = Completion([], [], "length")
        for i in range(sampling.max_new_tokens):
            output = text_model(model)(inputs_embeds=x, position_ids=positions, use_cache=False)
            logits = model.get_output_embeddings()(output.last_hidden_state[:, -1])  # [1, V]
            u = uniform(torch.tensor(seed % 2**63), torch.tensor([i])).to(x.device)  # [1]
            token, logprob = sample(logits, u, sampling)  # [1] each
            completion.ids.append(token.item())
            completion.logprobs.append(logprob.item())
            if token.item() in eos_ids:
                completion.finish = "stop"
                break
            x = torch.cat([x, model.get_input_embeddings()(token)[None]], 1)
            if positions is not None:
                positions = torch.cat([positions, positions[:, :, -1:] + 1], 2)
        completions.append(completion)
    return completions


# ---- The fast decoder ----------------------------------------------------------------------------
# `generate` of transformers pads all rows to the longest and drags ended ones along until the last
# one ends. `Decoder` makes the same numbers with less work:
#   1. Slots. The KV cache [layers, 2, slots, kv_heads, columns, head_dim] is allocated once. A row
#      lives in one slot, its i-th position in column i: no pads are stored, and a row can be moved
#      or copied to another slot as it is.
#   2. Admit. A waiting row takes a free slot; all but the last embedding of its prompt run through
#      the layers at once (prefill, causal, without a mask). Equal rows (a GRPO group under one
#      prefix) are prefilled once and copied.
#   3. Step. One embedding per live row, the prompt's last one first: write its key and value to
#      (slot, position), attend to columns <= position, sample the next token, note it with its
#      log-prob, look up its embedding. Buffers change in place; nothing grows.
#   4. Retire. Ended rows leave, the last live rows move into their slots (the live ones always are
#      0..n-1), and waiting rows are admitted once an eighth of the slots is free.
# A token is picked by a hash of (row's seed, token's index), so it depends on no neighbour, slot or
# order. On CUDA, n and the attended width are rounded up to a few sizes, each replayed as a CUDA
# graph, and the host looks for ended rows every 8 steps only; the CPU runs the same code eagerly.
# The tests run those fixed sizes on a CPU; the graphs themselves have not run on a GPU yet.

FAMILIES = ("qwen3", "qwen2", "llama", "qwen2_5_vl_text", "qwen2_vl_text")


def check_model(model):
    """ValueError for a model that this file would compute wrongly."""
    config = model.config.get_text_config()
    served = config.model_type in FAMILIES and config.hidden_act == "silu"
    if served:
        served = text_model(model).rotary_emb.rope_type not in ("dynamic", "longrope")
        served &= "sliding_attention" not in (getattr(config, "layer_types", None) or ())
    if not served:
        needed = "with silu, full attention and rotary positions that do not depend on the length"
        families = ", ".join(FAMILIES)
        raise ValueError(f"{config.model_type} is not served: use one of {families}, {needed}")


def is_cpu_fp32(x):
    """Whether x is fp32 on the CPU, where other calls are fastest than for bf16 or on a GPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


# Which library multiplies is a rule, not a measurement at start: they round differently, and a
# resumed run must repeat to the bit. On AMD (Zen 4 and 5, measured) torch's products in fp32 do
# without AVX-512, and reorder the matrix in each call. oneDNN's use it, and can be given a matrix
# in their own order; for small ones its calls cost more than they save.
ONEDNN_FROM = 2**16  # numbers of a matrix
IS_AMD = torch.cpu.get_capabilities().get("cpu_name", "").startswith("AMD")


def linear(x, weight, bias=None):
    """F.linear: x [..., in], weight [out, in], bias [out] -> [..., out], by the faster library."""
    if weight.is_mkldnn:  # in oneDNN's order
        return onednn_product(x, weight, bias)
    if OneDNNLinear.serves(x, weight):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn_product(x, weight, bias=None):
    """As F.linear, without a gradient: an operator that torch.compile writes, too."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_is_faster(weight):
    """Whether products with a weight that stays as it is are faster in oneDNN's order."""
    if weight.device.type != "cpu" or weight.numel() < ONEDNN_FROM:
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # a build of torch without oneDNN
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512"


class OneDNNLinear(torch.autograd.Function):
    """fp32 linear layers whose three products, forward and backward, are oneDNN's."""

    @staticmethod
    def serves(x, weight):
        """Whether it is the faster one: on AMD, for fp32 that is not to be rounded."""
        if not IS_AMD or not onednn_is_faster(weight):
            return False
        return x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_of_rows = grad.flatten(0, -2)  # [N, out]
        grad_x = None
        if needs_x:
            grad_x = onednn_product(grad, weight.T.contiguous())
        grad_weight = None
        if needs_weight:
            rows = x.flatten(0, -2)  # [N, in]
            grad_weight = onednn_product(grad_of_rows.T.contiguous(), rows.T.contiguous())
        grad_bias = None
        if needs_bias:
            grad_bias = grad_of_rows.sum(0)
        return grad_x, grad_weight, grad_bias


class FastLinear(torch.nn.Linear):
    """torch.nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def use_fast_linears(model):
    """Let the layers of a policy that is trained whole, not in shards, multiply by `linear`."""
    for module in text_model(model).layers.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = FastLinear


@dataclass
class PackedLinear:
    """Linear layers that read the same input, as one matrix product."""

    weight: torch.Tensor  # [out, in], in the order that is fastest
    bias: torch.Tensor | None  # [out]

    def __call__(self, x):
        """x [N, in] -> [N, out]."""
        return linear(x, self.weight, self.bias)


def pack(dtype, *linears):
    """torch.nn.Linear modules that read the same input -> one PackedLinear."""
    weight = unshard(linears[0].weight).to(dtype)  # [out, in]
    if len(linears) > 1:
        weight = torch.cat([unshard(linear.weight).to(dtype) for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([unshard(linear.bias).to(dtype) for linear in linears])
    if onednn_is_faster(weight):
        rows_of_a_step = 64
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows_of_a_step)
    elif is_cpu_fp32(weight):
        weight = weight.T.contiguous().T  # columns in memory: a little faster
    return PackedLinear(weight, bias)


@dataclass
class Block:
    """The packed weights of one layer. qk_norm: [H + KV, D], or None where there is none."""

    norm1: torch.Tensor
    qkv: PackedLinear
    qk_norm: torch.Tensor | None
    out: PackedLinear
    norm2: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass
class Job:
    """A row that waits or lives in a slot."""

    number: int  # of the row in the call
    row: Row
    seed: int  # of its tokens


class Decoder:
    """Batched generation with the weights of a Hugging Face Qwen3, Qwen2 or Llama model.

    eos_ids: end tokens (None: the configuration's). slots: rows decoded at a time. dtype: of packed
    weights and cache (None: the model's). Call `refresh` after the weights change.
    """

    def __init__(self, model, eos_ids=None, slots=64, dtype=None):
        check_model(model)
        if slots < 1:
            raise ValueError(f"slots is {slots}; the decoder needs 1 or more")
        if eos_ids is None:
            eos_ids = config_end_ids(model)
        self.model = model
        self.text = text_model(model)
        self.config = model.config.get_text_config()
        self.eos_ids = list(eos_ids)
        self.max_slots = slots
        weight = model.get_input_embeddings().weight  # [V, d]
        self.device = weight.device
        self.dtype = dtype or weight.dtype
        self.heads = self.config.num_attention_heads  # H
        self.kv_heads = self.config.num_key_value_heads  # KV
        self.head_dim = self.text.layers[0].self_attn.head_dim  # D
        self.cuda = self.device.type == "cuda"
        self.fixed = self.cuda  # few sizes of a step; a test sets it on the CPU
        if self.cuda:
            self.pool = torch.cuda.graph_pool_handle()  # graphs take turns: one memory for all
        self.refresh()

    def refresh(self):
        """Free packed weights and cache; the next use packs the module's current weights."""
        self.blocks = []
        self.norm = None
        self.head = None
        self.table = None
        self.cache = None
        self.graphs = {}
        self.slots = 0
        self.columns = 0

    @torch.no_grad()
    def embed(self, prompts, prefixes=None):
        """Prompts, and a prefix [L, d] or None for each -> Rows, by the packed embedding table."""
        self._pack()
        return embed_rows(self.model, self.table, prompts, prefixes)

    @torch.inference_mode()
    def generate(self, rows, sampling=Sampling(), seeds=None, progress=None):
        """One Completion a Row, in their order.

        seeds: an int a row (None: by torch's generator). progress: told how many rows just ended.
        """
        queue = self._queue(rows, seeds)
        self._pack()
        longest = max((row.length for row in rows), default=0)
        self._reserve(longest + sampling.max_new_tokens, len(rows))

        completions = [None] * len(rows)
        jobs = []  # that of slot 0, of slot 1, ...
        width = 0  # columns that the longest of them has written
        while queue or jobs:
            free = self.slots - len(jobs)
            if queue and free >= max(1, self.slots // 8):
                new = [queue.popleft() for _ in range(min(free, len(queue)))]
                jobs = self._admit(new, jobs, sampling)
                width = max(width, *(job.row.length - 1 for job in jobs))
            for _ in range(8 if self.fixed else 1):
                width += 1
                self._run(len(jobs), width, sampling)

            before = len(jobs)
            jobs, width = self._retire(jobs, completions, width)
            if progress and len(jobs) < before:
                progress(before - len(jobs))
        return completions

    def _queue(self, rows, seeds):
        """The rows as Jobs, in the order in which they are admitted."""
        if seeds is None:
            seeds = torch.randint(2**62, (len(rows),)).tolist()
        if len(seeds) != len(rows):
            raise ValueError(f"there are {len(rows)} rows and {len(seeds)} seeds: give one a row")
        jobs = [Job(number, row, seeds[number] % 2**63) for number, row in enumerate(rows)]
        # Similar lengths together, and equal rows.
        jobs.sort(key=lambda job: (-job.row.length, job.row.key))
        return deque(jobs)

    def _pack(self):
        """Copy the module's weights in the order that is fastest, unless that is done."""
        if self.blocks:
            return
        for layer in self.text.layers:
            self.blocks.append(self._pack_block(layer))
        self.norm = unshard(self.text.norm.weight).to(self.dtype)
        self.head = pack(self.dtype, self.model.get_output_embeddings())
        self.table = unshard(self.model.get_input_embeddings().weight).detach().to(self.dtype)

    def _pack_block(self, layer):
        attention = layer.self_attn
        mlp = layer.mlp
        qk_norm = None
        if hasattr(attention, "q_norm"):
            q_norm = unshard(attention.q_norm.weight).to(self.dtype).expand(self.heads, -1)
            k_norm = unshard(attention.k_norm.weight).to(self.dtype).expand(self.kv_heads, -1)
            qk_norm = torch.cat([q_norm, k_norm])  # [H + KV, D]
        return Block(
            norm1=unshard(layer.input_layernorm.weight).to(self.dtype),
            qkv=pack(self.dtype, attention.q_proj, attention.k_proj, attention.v_proj),
            qk_norm=qk_norm,
            out=pack(self.dtype, attention.o_proj),
            norm2=unshard(layer.post_attention_layernorm.weight).to(self.dtype),
            gate_up=pack(self.dtype, mlp.gate_proj, mlp.up_proj),
            down=pack(self.dtype, mlp.down_proj),
        )

    def _reserve(self, columns, rows):
        """Allocate cache and per-slot state, unless those of the last call are large enough."""
        slots = max(self.slots, min(self.max_slots, rows))
        columns = max(self.columns, columns)
        if slots == self.slots and columns == self.columns:
            return
        self.slots = slots
        self.columns = columns
        self.graphs = {}
        self.cache = None  # free the old one first

        zeros = partial(torch.zeros, device=self.device)
        layers = self.config.num_hidden_layers
        shape = (layers, 2, slots, self.kv_heads, columns, self.head_dim)
        self.cache = zeros(shape, dtype=self.dtype)  # keys and values

        # What a slot reads next, at which position, and the position where its row must end.
        self.input = zeros(slots, self.config.hidden_size, dtype=self.dtype)
        self.pos = zeros(slots, dtype=torch.long)
        self.stop = zeros(slots, dtype=torch.long)
        self.shift = zeros(slots, dtype=torch.long)  # rotary position minus column, after an image
        self.live = zeros(slots, dtype=torch.bool)

        # For each column: the number that picks the token which follows, that token, its log-prob.
        self.uniforms = zeros(slots, columns)
        self.ids = zeros(slots, columns, dtype=torch.long)
        self.logprobs = zeros(slots, columns)

        self.slot = torch.arange(slots, device=self.device)
        self.column = torch.arange(columns, device=self.device)
        self.is_end = zeros(len(self.table), dtype=torch.bool)
        self.is_end[self.eos_ids] = True
        self.cos, self.sin = self._cos_sin(self.column)

    def _cos_sin(self, positions):
        """Positions [N], or [3, N] of three axes -> cosine and sine [N, D], by the module's own."""
        positions = positions[..., None, :]  # [1, N] or [3, 1, N]
        if sees_images(self.model):
            positions = positions.expand(3, 1, -1)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self.text.rotary_emb(like, positions)  # [1, N, D] each
        first, second = sin[0].chunk(2, -1)
        return cos[0], torch.cat([-first, second], -1)  # with the sign that "rotate half" flips

    def _norm(self, x, weight):
        eps = self.config.rms_norm_eps
        if is_cpu_fp32(x):  # half the time of F.rms_norm
            mean_square = torch.linalg.vecdot(x, x) / x.shape[-1]
            return x * (mean_square + eps).rsqrt_()[..., None] * weight
        if weight.dim() == 1:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight  # of each head

    def _layers(self, x, cos, sin, attend):
        """Inputs x [N, d], cosine and sine [N, D] -> hidden states [N, d].

        attend: (queries [N, H, D], keys and values [N, KV, D], layer) -> [N, H, D].
        """
        cos = cos[:, None]  # [N, 1, D]: for all heads
        sin = sin[:, None]
        for layer, block in enumerate(self.blocks):
            y = block.qkv(self._norm(x, block.norm1))
            y = y.view(len(x), -1, self.head_dim)  # [N, H + 2 KV, D]
            qk, v = y.split([self.heads + self.kv_heads, self.kv_heads], 1)
            if block.qk_norm is not None:
                qk = self._norm(qk, block.qk_norm)
            qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
            y = attend(qk[:, : self.heads], qk[:, self.heads :], v, layer)
            x = x + block.out(y.reshape(len(x), -1))
            gate, up = block.gate_up(self._norm(x, block.norm2)).chunk(2, -1)  # [N, ffn] each
            x = x + block.down(F.silu(gate) * up)
        return x

    def _admit(self, new, jobs, sampling):
        """Put new Jobs into the slots behind those of `jobs`; returns the Jobs of all slots."""
        first = len(jobs)
        donor = {job.row.key: slot for slot, job in enumerate(jobs)}  # who holds a row's cache
        fresh = []  # to be prefilled
        copies = []  # whose cache is copied from a donor
        for job in new:
            if job.row.key in donor:
                copies.append(job)
            else:
                donor[job.row.key] = first + len(fresh)
                fresh.append(job)

        # Rows that are prefilled together must be neighbours in the slots: so they are, because the
        # queue hands out the longest rows first, and micro_batches keeps that order.
        lengths = [job.row.length for job in fresh]
        tokens_at_once = 16384 if self.cuda else 512
        for group in micro_batches(lengths, tokens_at_once):
            assert group == list(range(group[0], group[0] + len(group))), "rows are out of order"
            self._prefill(first + group[0], [fresh[number].row for number in group])

        width = max(job.row.length for job in new)
        donors = [donor[job.row.key] for job in copies]
        behind = slice(first + len(fresh), first + len(new))
        self.cache[:, :, behind, :, :width] = self.cache[:, :, donors, :, :width]

        self._start(first, fresh + copies, sampling)
        return jobs + fresh + copies

    def _start(self, first, new, sampling):
        """Set the state of the slots from `first` on, each field by one copy to the device."""
        slots = slice(first, first + len(new))
        tensor = partial(torch.tensor, device=self.device)
        length = tensor([job.row.length for job in new])
        seed = tensor([job.seed for job in new])
        self.input[slots] = torch.stack([job.row.prompt[-1] for job in new])
        self.pos[slots] = length - 1
        self.stop[slots] = length - 1 + sampling.max_new_tokens
        if sees_images(self.model):
            last = torch.stack([job.row.positions[0, -1] for job in new])
            self.shift[slots] = last - (length - 1)
        self.live[slots] = True
        index = self.column - length[:, None] + 1  # [new, columns]: which new token is picked there
        self.uniforms[slots] = uniform(seed[:, None], index)

    def _prefill(self, first, rows):
        """Fill the cache of the slots from `first` on with all but each Row's last embedding."""
        inputs = [torch.cat([row.prefix, row.prompt[:-1]]) for row in rows]
        x = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # [n, T, d]
        n, T, _ = x.shape
        if T == 0:
            return
        slots = slice(first, first + n)
        cos = self.cos[:T].repeat(n, 1)  # [n T, D]
        sin = self.sin[:T].repeat(n, 1)
        if sees_images(self.model):
            positions = pad_positions([row.positions for row in rows])[:, :, :T]  # [3, n, T]
            cos, sin = self._cos_sin(positions.flatten(1))

        def attend(q, k, v, layer):
            q = q.view(n, T, -1, self.head_dim).transpose(1, 2)  # [n, H, T, D]
            k = k.view(n, T, -1, self.head_dim).transpose(1, 2)  # [n, KV, T, D]
            v = v.view(n, T, -1, self.head_dim).transpose(1, 2)
            self.cache[layer, 0, slots, :, :T] = k
            self.cache[layer, 1, slots, :, :T] = v
            # Causal and no more: what right pads write is overwritten before it is read.
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return y.transpose(1, 2)

        self._layers(x.flatten(0, 1), cos, sin, attend)

    def _step(self, n, width, sampling):
        """Read one embedding in each slot < n; sample, note and embed the token that follows."""
        slot = self.slot[:n]
        pos = self.pos[:n]
        live = self.live[:n]
        future = self.column[:width] > pos[:, None]  # [n, width]
        mask = torch.zeros_like(future, dtype=self.dtype).masked_fill_(future, -torch.inf)
        group = self.heads // self.kv_heads  # G heads share a key head
        mask = mask[:, None, None].expand(-1, -1, group, -1)  # [n, 1, G, width]

        def attend(q, k, v, layer):
            keys, values = self.cache[layer]  # [slots, KV, columns, D] each
            keys[slot, :, pos] = k
            values[slot, :, pos] = v
            keys = keys[:n, :, :width]
            values = values[:n, :, :width]
            # The G heads stand where query positions would: no copies of keys.
            q = q.reshape(n, self.kv_heads, group, self.head_dim)  # [n, KV, G, D]
            if is_cpu_fp32(q):  # for one query a little faster than the fused kernel
                scores = q @ keys.mT * self.head_dim**-0.5 + mask  # [n, KV, G, width]
                return scores.softmax(-1) @ values
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

        rotary_pos = pos + self.shift[:n]
        x = self._layers(self.input[:n], self.cos[rotary_pos], self.sin[rotary_pos], attend)
        logits = self.head(self._norm(x, self.norm))  # [n, V]
        token, logprob = sample(logits, self.uniforms[slot, pos], sampling)
        self.ids[slot, pos] = token
        self.logprobs[slot, pos] = logprob
        self.input[:n] = F.embedding(token, self.table)
        # An ended row stands still, writing behind its completion, until it is retired.
        pos += live
        live &= ~self.is_end[token] & (pos < self.stop[:n])

    def _run(self, n, width, sampling):
        """One step. On CUDA a size's first one loads kernels, the next is captured as a graph."""
        if self.fixed:
            n = min(self.slots, 1 << (n - 1).bit_length())  # the next power of two
            width = min(self.columns, math.ceil(width / 256) * 256)
        # One graph serves calls of every max_new_tokens: a step does not read it.
        size = (n, width, replace(sampling, max_new_tokens=1))
        if size not in self.graphs:
            self._step(*size)
            if self.cuda:
                self.graphs[size] = None
            return
        if self.graphs[size] is None:
            self.graphs[size] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[size], pool=self.pool):
                self._step(*size)
        self.graphs[size].replay()

    def _retire(self, jobs, completions, width):
        """Note what ended rows wrote and close the gaps -> the Jobs that live on, their width."""
        live = self.live[: len(jobs)].tolist()
        if all(live):
            return jobs, width
        pos = self.pos[: len(jobs)].tolist()
        width = 0
        for slot, job in enumerate(jobs):
            if live[slot]:
                width = max(width, pos[slot])
                continue
            columns = slice(job.row.length - 1, pos[slot])
            ids = self.ids[slot, columns].tolist()
            finish = "stop" if ids[-1] in self.eos_ids else "length"
            logprobs = self.logprobs[slot, columns].tolist()
            completions[job.number] = Completion(ids, logprobs, finish)

        # The last live rows move into the slots of ended ones.
        count = sum(live)
        holes = [slot for slot in range(count) if not live[slot]]
        movers = [slot for slot in range(count, len(jobs)) if live[slot]]
        if holes:
            self.cache[:, :, holes, :, :width] = self.cache[:, :, movers, :, :width]
            slot_state = (self.input, self.pos, self.stop, self.shift, self.live)
            for state in (*slot_state, self.uniforms, self.ids, self.logprobs):
                state[holes] = state[movers]
        for hole, mover in zip(holes, movers):
            jobs[hole] = jobs[mover]
        return jobs[:count], width


def complete(decoder, reader, prompts, prefixes, sampling, seeds, style="auto", progress=None):
    """(completions, texts) of prompts under prefixes, cut at the stops of their format.

    prompts, prefixes, seeds: one each a row. See Decoder.embed, Decoder.generate, texts_of.
    """
    rows = decoder.embed(prompts, prefixes)
    completions = decoder.generate(rows, sampling, seeds, progress)
    stops = rewards.stop_strings(reader.tokenizer, style)
    return texts_of(completions, reader.tokenizer, stops)


def texts_of(completions, tokenizer, stops=()):
    """(completions, texts without special tokens), each cut at the first of the `stops` strings.

    The token that completes the string is a completion's last; the text ends before the string.
    """
    cut = []
    texts = []
    for completion in completions:
        text = tokenizer.decode(completion.ids, skip_special_tokens=True)
        if first_stop(text, stops) is not None:
            for count in range(1, len(completion.ids) + 1):
                text = tokenizer.decode(completion.ids[:count], skip_special_tokens=True)
                if first_stop(text, stops) is not None:
                    break
            completion = Completion(completion.ids[:count], completion.logprobs[:count], "stop")
            text = text[: first_stop(text, stops)]
        cut.append(completion)
        texts.append(text)
    return cut, texts


def first_stop(text, stops):
    """Where the first of the strings in `stops` begins in a text; None if there is none of them."""
    places = [text.index(stop) for stop in stops if stop in text]
    return min(places, default=None)


# --------------------------------------------------------------------------------------------------
# 4. Log-probs under a prefix, for training

CHUNK = 2**25  # logits that training makes at a time: 128 MB in fp32


class HeadLogProb(torch.autograd.Function):
    """Log-probs of tokens; logits exist for a chunk at a time, backward computes them again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, sampling, with_entropy, with_backward):
        """hidden [N, d], weight [V, d], targets [N] -> log-probs [N], entropies [N] (or zeros)."""
        logprobs = hidden.new_zeros(len(hidden), dtype=torch.float32)
        entropy = hidden.new_zeros(len(hidden), dtype=torch.float32)
        size = max(1, CHUNK // len(weight))
        ctx.chunks = [slice(start, start + size) for start in range(0, len(hidden), size)]
        ctx.sampling = sampling
        probs_of_only_chunk = None  # kept for backward, which needs as much memory anyway
        for chunk in ctx.chunks:
            logits = linear(hidden[chunk], weight)  # [chunk, V]
            logp = shape_logits(logits, sampling, targets[chunk]).log_softmax(-1)
            logprobs[chunk] = logp.gather(1, targets[chunk, None])[:, 0]
            if with_backward and len(ctx.chunks) == 1:
                probs_of_only_chunk = logp.exp()
            if with_entropy:
                probs = logp.exp() if probs_of_only_chunk is None else probs_of_only_chunk
                entropy[chunk] = -torch.linalg.vecdot(probs, logp)
        ctx.save_for_backward(hidden, weight, targets, probs_of_only_chunk)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        """d logp(target) / d logits = (onehot - softmax) / temperature. Works once: see neg_."""
        hidden, weight, targets, probs_of_only_chunk = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad = grad[:, None] / (ctx.sampling.temperature or 1)  # [N, 1]
        for chunk in ctx.chunks:
            probs = probs_of_only_chunk
            if probs is None:
                logits = linear(hidden[chunk], weight)  # [chunk, V]
                probs = shape_logits(logits, ctx.sampling, targets[chunk]).softmax(-1)
            grad_logits = probs.neg_()
            grad_logits.scatter_add_(1, targets[chunk, None], torch.ones_like(grad[chunk]))
            grad_logits = grad_logits.mul_(grad[chunk]).to(weight.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
        return grad_hidden, grad_weight, None, None, None, None


def completion_logprobs(
    model, prompts, completions, prefixes, sampling=Sampling(), with_entropy=True, share=True
):
    """Log-probs [N] and entropies [N] (or None) of all N completion tokens, row after row.

    prompts: Prompts. completions: their token ids. prefixes: [L, d] or None each, or None. By the
    Hugging Face module, so gradients reach weights and prefixes (not through the entropy). share:
    what rows have in common is computed once; without, plainly, which gives the same. Memory is
    that of right-padded hidden states [B, T, d], never of logits [B, T, V]; split a long batch by
    `micro_batches` first.
    """
    check_model(model)
    if len(completions) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts and {len(completions)} completions")
    if not prompts:  # a row without a token to score: a rank without rows stays in step
        prompts = [Prompt([0, 0])]
        completions = [[]]
        prefixes = None
    stems = stems_of(prompts, prefixes)
    prefixes = check_rows(model, prompts, prefixes)
    x, positions = training_inputs(model, prompts, completions, prefixes)  # [B, T, d]
    B, T, _ = x.shape

    # One entry a completion token: the hidden state at this place of the B * T predicts the target.
    places = []
    targets = []
    lengths = []
    for row, (prefix, prompt, completion) in enumerate(zip(prefixes, prompts, completions)):
        before_first = len(prefix) + len(prompt.ids) - 1  # the last token of the prompt
        first_place = row * T + before_first
        places += range(first_place, first_place + len(completion))
        targets += completion
        lengths.append(before_first + len(completion))
    places = torch.tensor(places, dtype=torch.long, device=x.device)  # [N]
    targets = torch.tensor(targets, dtype=torch.long, device=x.device)  # [N]

    if share and len(set(stems)) < B:
        sharing = share_stems(stems, lengths, x.device)
        hidden = shared_hidden_states(model, x, positions, sharing)  # [S, d]
        places = sharing.place.flatten()[places]
    else:
        output = text_model(model)(inputs_embeds=x, position_ids=positions, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)  # [B T, d]
    hidden = F.embedding(places, hidden)  # [N, d]; its backward adds in a fixed order

    weight = unshard(model.get_output_embeddings().weight)  # [V, d]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(dtype)
        weight = weight.to(dtype)
    with_backward = torch.is_grad_enabled()
    logprobs, entropy = HeadLogProb.apply(
        hidden, weight, targets, sampling, with_entropy, with_backward
    )
    return logprobs, entropy if with_entropy else None


def training_inputs(model, prompts, completions, prefixes):
    """Inputs [B, T, d] and rotary positions (None, or [3, B, T]) of rows without their last token.

    A row is [prefix | prompt | completion | pads]; pads follow all that counts, so causality hides
    them: no mask.
    """
    table = unshard(model.get_input_embeddings().weight)  # [V, d]
    ids = []
    for prompt, completion in zip(prompts, completions):
        ids.append((prompt.ids + list(completion))[:-1])  # the last one is predicted, never read
    inputs = []
    for prefix, x in zip(prefixes, embed_tokens(model, table, ids, prompts)):
        inputs.append(torch.cat([prefix.to(table.dtype), x]))
    x = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # [B, T, d]
    if not sees_images(model):
        return x, None
    positions = []
    for prompt, completion, prefix in zip(prompts, completions, prefixes):
        positions.append(rotary_positions(model, prompt, len(prefix), len(completion)))
    return x, pad_positions(positions)[:, :, :-1].to(x.device)  # [3, B, T]


# ---- What the rows of a group have in common, computed once --------------------------------------
# The rollouts of a group that have the same prefix, or none, begin alike: their *stem*, the prefix
# and all of the prompt but its last token. All tokens of a micro-batch stand in one row then, each
# stem once and no pads, and go through the layers. Attention alone sees rows as they were.


@dataclass(frozen=True)
class Stem:
    """Equal for rows that begin alike."""

    prompt_ids: tuple[int, ...]
    image_id: int  # Python's id(...) of the objects that the rows were given, alive meanwhile
    prefix_id: int
    length: int  # tokens, the prefix included


@dataclass
class Sharing:
    """B rows of up to T tokens as one row of S tokens."""

    place: torch.Tensor  # [B, T]: where a row's token stands among the S; 0 for a pad
    source: torch.Tensor  # [S]: which of the B * T tokens stands there, a stem's in its first row


def stems_of(prompts, prefixes):
    """The Stem of each row. Of two equal prefixes that are two tensors, each has its gradient."""
    if prefixes is None:
        prefixes = [None] * len(prompts)
    stems = []
    for prompt, prefix in zip(prompts, prefixes):
        length = len(prompt.ids) - 1
        if prefix is not None:
            length += len(prefix)
        stems.append(Stem(tuple(prompt.ids), id(prompt.image), id(prefix), length))
    return stems


def share_stems(stems, lengths, device):
    """The Sharing of rows of these lengths, the stem included.

    Two rows of a stem of 3 tokens, 5 and 4 long: place [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]], source
    [0, 1, 2, 3, 4, 8].
    """
    T = max(lengths)
    first = {}  # where a stem begins among the S tokens
    place = []
    source = []
    for row, (stem, length) in enumerate(zip(stems, lengths)):
        if stem not in first:
            first[stem] = len(source)
            source += range(row * T, row * T + stem.length)
        place_of_row = list(range(first[stem], first[stem] + stem.length))
        place_of_row += range(len(source), len(source) + length - stem.length)
        source += range(row * T + stem.length, row * T + length)
        place.append(place_of_row + [0] * (T - length))
    return Sharing(torch.tensor(place, device=device), torch.tensor(source, device=device))


def shared_hidden_states(model, x, positions, sharing):
    """Hidden states [S, d] of inputs [B, T, d] under a Sharing."""
    B, T, width = x.shape
    x = x.view(B * T, width)[sharing.source][None]  # [1, S, d]
    if positions is None:
        positions = (sharing.source % T)[None]  # [1, S]
    else:
        positions = positions.flatten(1)[:, None, sharing.source]  # [3, 1, S]
    text = text_model(model)
    text.config._attn_implementation = "shared"  # for good: checkpointing calls it in backward, too
    no_mask = x.new_empty(1, 1, 1, 1)  # so that transformers makes none
    output = text(
        inputs_embeds=x,
        position_ids=positions,
        attention_mask=no_mask,
        use_cache=False,
        sharing=sharing,
    )
    return output.last_hidden_state[0]


def shared_attention(module, q, k, v, mask, sharing=None, **options):
    """Causal attention within rows: q [1, H, S, D], k and v [1, KV, S, D] -> [1, S, H, D], None.

    Where nothing is shared it is transformers' own.
    """
    if sharing is None:
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    def rows(x):  # [1, H, S, D] -> [B, H, T, D]
        heads, _, dim = x.shape[1:]
        tokens = x[0].transpose(0, 1).flatten(1)  # [S, H D]
        return F.embedding(sharing.place, tokens).unflatten(-1, (heads, dim)).transpose(1, 2)

    y = F.scaled_dot_product_attention(
        rows(q), rows(k), rows(v), is_causal=True, scale=options["scaling"], enable_gqa=True
    )
    y = y.transpose(1, 2).flatten(0, 1)  # [B T, H, D]
    return y[sharing.source][None], None


AttentionInterface.register("shared", shared_attention)
AttentionMaskInterface.register("shared", sdpa_mask)


# --------------------------------------------------------------------------------------------------
# The demonstration


@dataclass
class PrefixConfig:
    """Which answers to show."""

    model: str = HfArg(default=rewards.DEFAULT_WORLD, help="hub name, folder, run folder or world")
    vae: str | None = HfArg(default=None, help="(default: the world's, or vae beside a run folder)")
    prompt: str | None = HfArg(default=None, help="the question (default: one of the world)")
    source: list[str] | None = HfArg(default=None, help="default: none, every domain, prior, noise")
    length: int = HfArg(default=8, help="prefix rows L")
    draws: int = HfArg(default=3, help="prefixes drawn per source")
    temperature: float = HfArg(default=0.0, help="of token sampling; 0: greedy")
    max_new_tokens: int = HfArg(default=64, help="longest answer")

    def __post_init__(self):
        vae_stage.require_at_least(self, length=0, draws=1, temperature=0, max_new_tokens=1)
        is_world = rewards.world_of(self.model) is not None
        if self.prompt is None and not is_world:
            raise ValueError("--prompt is missing: the question")
        if self.vae is None:
            root = rewards.world_root(self.model) if is_world else Path(self.model).parent
            self.vae = f"{root}/vae"


def vae_of(config):
    """The VAE of the settings; that of a world is trained where it is missing."""
    is_missing = not Path(config.vae, "config.json").is_file()
    if is_missing and rewards.world_of(config.model) is not None:
        settings = vae_stage.VAEConfig(model=config.model, out=config.vae)
        return vae_stage.train(vae_stage.resolve_world(settings))
    return VAE.load(config.vae)


def main(argv=None):
    """Print answers to one question under prefixes of several sources."""
    config = vae_stage.parse_settings(PrefixConfig, __doc__, argv)
    row = {"question": config.prompt}
    if config.prompt is None:
        row = rewards.load_task(config.model, splits=("test",)).test[0]
    vae = None
    if config.source is None or any(map(needs_vae, config.source)):
        vae = vae_of(config)
    sources = config.source or ["none", *vae.domains, "prior", "noise"]
    model, reader = load_policy(config.model)
    table = model.get_input_embeddings().weight.detach()
    decoder = Decoder(model, end_ids(model, reader.tokenizer))
    prompt = prompt_of(row, reader)
    sampling = Sampling(config.temperature, max_new_tokens=config.max_new_tokens)
    gold = f"    gold answer: {row['answer']}" if "answer" in row else ""
    print(f"question: {row['question']}{gold}")
    for source in sources:
        draws = config.draws
        if source == "none" and config.temperature == 0:
            draws = 1  # all of them would be the same
        palette = Palette(vae, table, source, config.length)
        prefixes = [palette.draw(seed).embeddings for seed in range(draws)]
        _, texts = complete(decoder, reader, [prompt] * draws, prefixes, sampling, range(draws))
        for text in texts:
            print(f"{source:>8}: {text}")


if __name__ == "__main__":
    vae_stage.run_main(main, "prefix.py")
