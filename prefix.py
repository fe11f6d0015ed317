"""The policy under a prefix: latent z -> prefix embeddings, prefix -> rollout, rollout -> log-probs (Sec. 3.3).

Three parts: 1. the palette, where prefixes come from; 2. the batched decoder, where every row has a prefix of its own, or
none; 3. log-probs of completions under their prefixes, for training: the same numbers the decoder sampled from.

A row is everywhere [prefix | prompt | completion | pads]: L prefix embeddings (any L per row, also 0), then token ids. The
prefix stands right before the prompt, never before pads, and position 0 is the row's first real slot.

How the decoder works. `generate` of transformers can read such rows (`inputs_embeds`), but pads all to the longest and drags
finished rows along until the last one ends. `Decoder` makes the same numbers with less work:
  1. Slots. The KV cache [layers, 2, slots, kv_heads, columns, head_dim] is allocated once. A row lives in one slot, its i-th
     position in column i: no pads are stored, and a row can be moved or copied to another slot as it is.
  2. Admit. A waiting row takes a free slot; all but its last prompt token run through the layers at once (prefill, causal,
     without a mask). Rows of equal prompt and prefix (a GRPO group) are prefilled once and copied.
  3. Step. One token per live row, the last prompt token first: write its key and value to (slot, position), attend to
     columns <= position, sample the next token, note it and its log-prob. Buffers change in place; nothing grows.
  4. Retire. Ended rows leave, the last live rows move into their slots (the live ones always are 0..n-1), and waiting rows
     are admitted once an eighth of the slots is free. One long row holds nobody up.
A token is picked by a hash of (row's seed, token's index), so it depends on no neighbour, slot or order. Weights are packed
at the first generate after `refresh`, in the order that is fastest where they lie. On CUDA, n and the attended width are rounded
up to a few sizes, each replayed as a CUDA graph, and the host looks for ended rows every 8 steps only; the CPU runs the same
code eagerly. The tests run those fixed sizes on a CPU; the graphs themselves have not run on a GPU yet.

Images. The prompt of a row with an image is a `Prompt`: a list of ids that carries its picture. Three places know of it:
embeddings (visual_rows: what the vision tower sees stands where the image tokens are), rotary positions (rope_positions: an
image's tokens have three axes, so all behind it lag their columns by rope_shift), and the key of shared prefills. Decoding
steps are those of text, their positions shifted.

Departs from the paper: "tiled" (one z repeated L times) is our default of the two readings of Eq. 9, `--independent` the other;
in the tiny world `evaluate.py --arms latent` sees no difference in pass@8. The VLM's GPT-style decoder stands in vae.py.

Run it (greedy answers to one question under several latents):
    python prefix.py                                                       # the tiny world; makes what is missing
    python prefix.py --model Qwen/Qwen3-0.6B --vae runs/qwen/vae --prompt "What is 17 * 23?"
    python prefix.py --model tiny-vl                                       # a drawn scene; or --image PATH --prompt "box of ..."
"""
import argparse
import math
import random
from collections import deque, namedtuple
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from rewards import IMAGE, VISION_END, VISION_START, prompt_ids, tiny_vl_task
from vae import TINY_BASES, Processor, add_flags, find_model, find_vae, model_class, read_tokenizer, reason, run_main, see_images

# ------------------------------------------------------------------------------------------------------------------------
# 1. The palette: where prefixes come from

SOURCES = ("none", "prior", "mixture", "shuffled", "noise", "gauss")        # and every domain of the VAE by its name


def load_tokenizer(name):
    """The tokenizer of a hub name, folder or "tiny". Raises ValueError in one sentence if there is no such model."""
    name = find_model(name)
    try:
        return read_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model '{name}': {reason(error)} (give a hub name, a folder written by "
                         "save_pretrained, or tiny)") from None


def load_policy(name, device="cpu", dtype=torch.float32):
    """A causal language model and its tokenizer, ready for rollouts (eval mode, no dropout). Errors as load_tokenizer.

    Of a vision-language model the tokenizer reads images too (vae.Processor), and the vision tower is frozen: our choice, as
    the VAE has learnt what it puts into prompts.
    """
    tokenizer, name = load_tokenizer(name), find_model(name)
    try:
        model = model_class(name).from_pretrained(name, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the weights of '{name}': {reason(error)}") from None
    if isinstance(tokenizer, Processor):
        model.model.visual.requires_grad_(False)
    return model, tokenizer


def end_ids(model, tokenizer):
    """All token ids that end a completion: generation_config's (or config's), the tokenizer's end token, which the warm-up
    trains, and the special token that the chat template writes after an assistant's turn (a base Qwen names only the first).
    """
    found = getattr(model.generation_config, "eos_token_id", None) or model.config.get_text_config().eos_token_id
    ends = {found} if isinstance(found, int) else set(found or ())
    ends |= {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("A")[2]
        ends |= set(tokenizer(after, add_special_tokens=False)["input_ids"][:1]) & set(tokenizer.all_special_ids)
    if not ends:
        raise ValueError("this model names no end token: no completion would ever stop; set eos_token in its tokenizer")
    return sorted(ends)


def check_source(source, domains):
    """ValueError for a prefix source that there is not."""
    if source not in (*SOURCES, *domains):
        raise ValueError(f"unknown prefix source '{source}': choose one of {', '.join([*SOURCES, *domains])}")


class Palette:
    """Draws prefixes of one kind (Eq. 9). `draw(seeds)` gives one prefix a row, determined by the row's seed alone.

    source: "prior" z ~ N(0, I); a domain's name: z from that domain's Gaussian; "mixture": a domain drawn per prefix;
        "none": no prefix. Controls: "shuffled", the mixture with the k entries of each z in random order: the same length
        and entries, at another place of the latent space; "noise", Gaussian rows scaled to the mean norm of real token
        embeddings; "gauss", rows from a Gaussian fitted to h. z: a fixed latent [k] or [L, k] instead of a draw.
    length: L, rows per prefix. tiled: one draw repeated L times, else L independent draws. (A draw through the GPT decoder
        makes 8 rows: at L = 8 a prefix is one draw either way, at L < 8 its first rows.)
    table: the policy's embedding table [V, d]; the VAE must have been trained on it (ValueError if not).
    """

    def __init__(self, vae, table, source="prior", length=8, tiled=True, z=None):
        if length < 0:
            raise ValueError(f"the prefix length L must be 0 or more, not {length}")
        domains = vae.domains if vae is not None else []
        check_source(source, domains)
        if vae is None and source not in ("none", "noise"):
            raise ValueError(f"the prefix source '{source}' needs a VAE: train one with vae.py")
        if vae is not None:
            vae.check_policy(table)
        self.vae, self.source, self.tiled, self.z = vae, source, tiled, z
        self.length = 0 if source == "none" else length
        self.rows = 1 if vae is None or source == "noise" else vae.rows         # that one draw makes
        self.width, self.device = table.shape[1], table.device
        # our choice: norm matched in expectation, E|row| = mean |token embedding|
        self.noise_std = table.float().norm(dim=-1).mean().item() / math.sqrt(self.width) if source == "noise" else 0.0

    def draw(self, seeds):
        """seeds: one int a prefix. Returns (rows, latents): lists of [L, d] and of [L or 1, k] (None for the controls).

        With L = 0 every prefix is None: the row starts with its prompt.
        """
        drawn = [self._draw_one(torch.Generator().manual_seed(seed)) if self.length else (None, None) for seed in seeds]
        return [rows for rows, _ in drawn], [z for _, z in drawn]

    @torch.no_grad()
    def _draw_one(self, generator):
        draws = 1 if self.tiled else -(-self.length // self.rows)
        randn = lambda *shape: torch.randn(*shape, generator=generator)
        z = None
        if self.source == "noise":
            rows = randn(draws, self.width) * self.noise_std                                    # [draws, d]
        elif self.source == "gauss":
            rows = self.vae.mean + randn(draws, len(self.vae.gauss_factor)) @ self.vae.gauss_factor    # [draws, rows * d]
        else:
            z = self.z.view(-1, self.vae.latent) if self.z is not None else self._latents(randn, draws, generator)
            rows = self.vae.decode(z)                                                           # [draws, rows * d]
        if len(rows) not in (1, -(-self.length // self.rows)):
            raise ValueError(f"a fixed z must have 1 or L = {self.length} rows, not {len(rows)}")
        rows = rows.view(-1, self.width)                                                        # [draws * rows, d]
        return rows.repeat(-(-self.length // len(rows)), 1)[:self.length].to(self.device), z    # [L, d], [draws, k]

    def _latents(self, randn, draws, generator):
        z = randn(draws, self.vae.latent)                                           # [draws, k]
        if self.source == "prior":
            return z
        domain = self.vae.domains.index(self.domain_of(generator.initial_seed()))
        z = self.vae.domain_mean[domain] + z @ self.vae.domain_factor[domain]
        return z[:, torch.randperm(z.shape[1], generator=generator)] if self.source == "shuffled" else z

    def domain_of(self, seed):
        """The domain that the latent of this seed comes from; None where it comes from none."""
        if self.source in ("mixture", "shuffled"):
            return random.Random(seed).choice(self.vae.domains)
        return self.source if self.vae is not None and self.source in self.vae.domains else None


# ------------------------------------------------------------------------------------------------------------------------
# 1b. Images, of vision-language models

class Prompt(list):
    """Token ids of a prompt with an image, which it carries: Pixels, whose n patches, merged m x m, are n / m^2 of its tokens."""

    def __init__(self, ids, image):
        super().__init__(ids)
        self.image = image


def images_of(prompts):
    """The image of every prompt, None for an ordinary list of ids."""
    return [getattr(prompt, "image", None) for prompt in prompts]


def prompt_of(row, tokenizer, instruction="", style="auto"):
    """The prompt of a task row or trace: rewards.prompt_ids; a Prompt if the row has an image, which stands before the text."""
    if row.get("image") is None:
        return prompt_ids(row["question"], tokenizer, instruction, style)
    if not isinstance(tokenizer, Processor):
        raise ValueError("a row has an image, but this model reads text only: use a Qwen2-VL or Qwen2.5-VL")
    image = tokenizer.read(row["image"])
    tokens = math.prod(image.grid) // tokenizer.settings["merge_size"] ** 2
    text = f"{VISION_START}{IMAGE * tokens}{VISION_END}{row['question']}"
    return Prompt(prompt_ids(text, tokenizer, instruction, style), image)


def check_prompts(rows, instruction, args):
    """ValueError for a task row that --model cannot read, or whose rollout would be too long: before a run, not in it.

    The tiny bases may not be there yet, and their own questions are short; only images are asked after.
    """
    if args.model in (*TINY_BASES, *TINY_BASES.values()):
        if any(row.get("image") is not None for row in rows) and args.model == "tiny":
            raise ValueError("the task's rows have images, but tiny reads text only: use --model tiny-vl")
        return
    from transformers import AutoConfig
    tokenizer = load_tokenizer(args.model)
    positions = AutoConfig.from_pretrained(find_model(args.model)).get_text_config().max_position_embeddings
    for row in rows:
        length = len(prompt_of(row, tokenizer, instruction, args.prompt))
        if length > args.max_prompt:
            raise ValueError(f"a prompt of {length} tokens is over --max-prompt {args.max_prompt}: raise it, or drop the question "
                             f"{row['question'][:80]!r}")
        if length + args.length + args.max_new_tokens > positions:
            raise ValueError(f"--length {args.length}, a prompt of {length} tokens and --max-new-tokens {args.max_new_tokens} are "
                             f"more than the {positions} positions of {args.model}")


def visual_tokens(model, image):
    """How many tokens of the prompt an image (Pixels or None) stands for."""
    return 0 if image is None else math.prod(image.grid) // model.config.vision_config.spatial_merge_size ** 2


def visual_rows(model, ids, images):
    """What the vision tower sees in each row's image (Pixels or None), and where it stands: a list of (first image token,
    [visual tokens, d]), no rows where there is no image; None if no row has one. An image that rows share is seen once.

    It stands where its first token does: an image token that the policy itself writes later is an ordinary token.
    """
    once = {id(image): image for image in images if image is not None}
    if not once:
        return None
    seen = dict(zip(once, see_images(model, list(once.values()))))
    none = next(iter(seen.values()))[:0]
    return [(0, none) if image is None else (row.index(model.config.image_token_id), seen[id(image)])
            for row, image in zip(ids, images)]


def rope_positions(model, ids, prefixes, images, columns):
    """Rotary positions [3, B, columns] (time, height, width) of rows [prefix | tokens]; None if no row has an image: then a
    token's position is its column.

    An image of h x w visual tokens stands at one time, its rows and columns count on from there, and the text goes on after
    max(h, w): less than its number of tokens, which shifts all that follows (Qwen2-VL, 2409.12191, Sec. 2.1).
    """
    if not any(images or ()):
        return None
    positions = torch.arange(columns).repeat(3, len(ids), 1)                                # [3, B, columns]
    for b, (row, prefix, image) in enumerate(zip(ids, prefixes, images)):
        if image is not None:
            n, w = visual_tokens(model, image), image.grid[2] // model.config.vision_config.spatial_merge_size
            start, cell = len(prefix) + row.index(model.config.image_token_id), torch.arange(n)
            positions[:, b, start:start + n] = start + torch.stack([0 * cell, cell // w, cell % w])
            positions[:, b, start + n:] += rope_shift(model, image)
    return positions.to(model.device)


def rope_shift(model, image):
    """By how much rotary positions differ from columns behind an image (Pixels or None): max(h, w) - h w, in visual tokens."""
    if image is None:
        return 0
    return max(image.grid[1:]) // model.config.vision_config.spatial_merge_size - visual_tokens(model, image)


# ------------------------------------------------------------------------------------------------------------------------
# 2. The batched decoder

FAMILIES = ("qwen3", "qwen2", "llama", "qwen2_5_vl_text", "qwen2_vl_text")
DROPPED = -1e30  # the logit of a filtered token: its exp is exactly 0 and, unlike with -inf, 0 * DROPPED is not NaN
CHUNK = 2 ** 25  # logits that training makes at a time: 128 MB in fp32


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the temperature (0: greedy, unfiltered), then the filters top-k, top-p and min-p."""
    temperature: float = 1.0
    top_p: float = 1.0  # keep the likeliest tokens until they sum to top_p
    top_k: int = 0  # keep the top_k likeliest; 0: all
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the likeliest
    max_new_tokens: int = 256

    @classmethod
    def of(cls, args):
        """From the flags of add_sampling_flags."""
        return cls(args.temperature, args.top_p, args.top_k, max_new_tokens=args.max_new_tokens)

    def __post_init__(self):
        if not (self.temperature >= 0 < self.top_p <= 1 and self.top_k >= 0 <= self.min_p <= 1 <= self.max_new_tokens):
            raise ValueError(f"{self} is out of range: it needs temperature >= 0, 0 < top_p <= 1, top_k >= 0, "
                             "0 <= min_p <= 1 and max_new_tokens >= 1.")


@dataclass
class Completion:
    ids: list[int]  # with the end token, when one was produced
    logprobs: list[float]  # under exactly the distribution each id was drawn from; greedy: at temperature 1
    finish: str  # "stop": an end token; "length": max_new_tokens


def uniform(seed, index):
    """Uniform numbers in [0, 1) from int64 tensors seed and index (broadcast): splitmix64 (Steele 2014), twice."""
    z = seed
    for offset in (0, index * (0x9E3779B97F4A7C15 - 2 ** 64)):  # int64 products wrap around
        z = z + offset
        for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2 ** 64), (27, 0x94D049BB133111EB - 2 ** 64), (31, 1)):
            z = (z ^ (z >> shift & 2 ** (64 - shift) - 1)) * factor  # the mask makes the shift unsigned
    return (z & 2 ** 23 - 1).float() * 2.0 ** -23  # not 24 bits: in fp32, u * total < total even if total exceeds 1


def shape_logits(logits, sampling, chosen=None):
    """Logits [N, V] -> fp32 logits [N, V] of the distribution that is sampled; filtered tokens get DROPPED.

    chosen [N]: the tokens that were sampled; they are kept, even if rounding has moved them across a filter's border.
    """
    z = logits.float() if sampling.temperature in (0, 1) else logits.float() / sampling.temperature
    if sampling.temperature == 0 or (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1, 0):
        return z
    ranked = z.topk(min(sampling.top_k or z.shape[1], z.shape[1])).values  # [N, k], falling
    probs = ranked.softmax(-1)
    kept = (probs.cumsum(-1) - probs < sampling.top_p) & (probs >= sampling.min_p * probs[:, :1])  # the first few
    drop = z < ranked.gather(1, kept.sum(-1, keepdim=True) - 1)  # below the last one kept
    return z.masked_fill(drop if chosen is None else drop.scatter(1, chosen[:, None], False), DROPPED)


def sample(logits, u, sampling):
    """Logits [N, V], uniform numbers u [N] -> tokens [N], log-probs [N]: the inverse CDF, one number per row."""
    probs = shape_logits(logits, sampling).softmax(-1)
    cdf = probs.cumsum(-1)
    token = (logits.argmax(-1, keepdim=True) if sampling.temperature == 0 else
             torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True))  # [N, 1], the first token with cdf > u
    return token[:, 0], probs.gather(1, token)[:, 0].log()


def text_model(model):
    """The transformer that reads embeddings: a vision-language model holds it beside its vision tower."""
    return getattr(model.model, "language_model", model.model)


def check_rows(model, prompts, prefixes, others):
    """Refuse what would be read wrongly (others: the rows' seeds or completions); returns one [L, d] prefix per row."""
    config, weight = model.config.get_text_config(), model.get_input_embeddings().weight
    rope = text_model(model).rotary_emb.rope_type if config.model_type in FAMILIES else "unknown"
    if rope in ("unknown", "dynamic", "longrope") or config.hidden_act != "silu" or \
            "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"this {config.model_type} model is not served: use one of {', '.join(FAMILIES)}, with silu, "
                         "full attention and rotary positions that do not change with the length.")
    prefixes = [None] * len(prompts) if prefixes is None else prefixes
    if not len(prompts) == len(prefixes) == len(others):
        raise ValueError(f"there are {len(prompts)} prompts, {len(prefixes)} prefixes and {len(others)} seeds or "
                         "completions; give one of each per row.")
    for row, (prompt, prefix) in enumerate(zip(prompts, prefixes)):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty; a row needs at least one token after its prefix.")
        if prefix is not None and (prefix.dim() != 2 or prefix.shape[1] != weight.shape[1]):
            raise ValueError(f"prefix {row} has shape {list(prefix.shape)}; this model needs [L, {weight.shape[1]}].")
    image_token = getattr(model.config, "image_token_id", None)
    for row, (prompt, image) in enumerate(zip(prompts, images_of(prompts)) if image_token is not None else ()):
        need, found = visual_tokens(model, image), list(prompt).count(image_token)
        if need != found or prompt[-1] == image_token:
            raise ValueError(f"prompt {row} has {found} image tokens, its image makes {need}; make prompts by prompt_of.")
    none = torch.zeros(0, weight.shape[1])
    return [(none if prefix is None else prefix).to(weight.device, weight.dtype) for prefix in prefixes]


def whole(weight):
    """A weight as a plain tensor. One that `--fsdp` has sharded is gathered, by all ranks at once, its gradient summed and
    sharded again; any other is returned as it is."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial        # only here: half a second that a single process does not need
    return weight.full_tensor(grad_placements=[Partial()])


def embed_rows(table, ids, prefixes, visual=None):
    """Embedding table [V, d], B token lists and B prefixes [L, d] -> right-padded embeddings [B, T, d]. visual: what visual_rows
    gives, if there are images: the rows that stand in place of their image tokens."""
    tokens = torch.tensor([i for row in ids for i in row], dtype=torch.long, device=table.device)
    embedded = F.embedding(tokens, table).split([len(row) for row in ids])
    if visual:
        embedded = [torch.cat([x[:start], v.to(x), x[start + len(v):]]) for x, (start, v) in zip(embedded, visual)]
    rows = [torch.cat([prefix.to(table.dtype), own]) for prefix, own in zip(prefixes, embedded)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def micro_batches(lengths, max_tokens):
    """Row numbers, longest first, grouped so that rows x longest <= max_tokens: [3, 9, 4], 9 -> [[1], [2, 0]]."""
    groups = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > max_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def is_cpu_fp32(x):
    """Whether x is of fp32 on the CPU, where other calls are fastest than for bf16 or on a GPU."""
    return (x.dtype, x.device.type) == (torch.float32, "cpu")


def pack(dtype, *linears):
    """Linear modules that read the same input -> one (matrix as tiles [t, in, out / t], bias [out] or None) in dtype."""
    weight, *more = (whole(m.weight).to(dtype) for m in linears)
    weight = torch.cat([weight, *more]) if more else weight  # [out, in]
    bias = None if linears[0].bias is None else torch.cat([whole(m.bias).to(dtype) for m in linears])
    if not is_cpu_fp32(weight):
        return weight.T[None], bias
    # Few rows times a large matrix are up to twice as fast by tiles that fit the CPU's cache, ordered [in, out] in memory.
    tile = next((size for size in (256, 192, 128, 64) if len(weight) % size == 0 and weight.numel() > 2 ** 19), len(weight))
    return weight.view(-1, tile, weight.shape[1]).mT.contiguous(), bias


def linear(x, packed):
    """x [N, in] -> [N, out]; on CPU, bf16 products of few rows are faster transposed, and stay so in memory."""
    tiles, bias = packed
    if (x.dtype, x.device.type) == (torch.bfloat16, "cpu"):
        y = (tiles[0].T @ x.T).T
    elif len(tiles) == 1:
        y = x @ tiles[0]
    else:
        y = torch.bmm(x.expand(len(tiles), -1, -1), tiles).transpose(0, 1).flatten(1)  # [t, N, out / t] -> [N, out]
    return y if bias is None else y + bias


# A row that waits or lives in a slot. length: of prefix and prompt. key: equal where prompts, prefixes and images are.
Job = namedtuple("Job", "row prompt prefix length key seed image")


class Decoder:
    """Batched generation with the weights of a Hugging Face Qwen3, Qwen2 or Llama model.

    eos_ids: end tokens (None: all of generation_config's, else config's; nothing else of generation_config is read).
    slots: rows decoded at a time (None: as many as fit into free CUDA memory). max_length: cache columns for prefix,
    prompt and new tokens (None: grows to what a call needs). dtype: of packed weights and cache (None: the model's).
    Call `refresh` after the weights change.
    """

    def __init__(self, model, eos_ids=None, slots=64, max_length=None, dtype=None):
        check_rows(model, [], None, [])
        if slots is not None and slots < 1:
            raise ValueError(f"slots is {slots}; the decoder needs 1 or more (None: as many as fit into CUDA memory).")
        for config in (model.generation_config, model.config.get_text_config()):
            eos_ids = getattr(config, "eos_token_id", None) if eos_ids is None else eos_ids
        self.eos_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or ())
        self.model, self.text, self.max_slots, self.max_length = model, text_model(model), slots, max_length
        self.config = model.config.get_text_config()
        self.heads, self.kv = self.config.num_attention_heads, self.config.num_key_value_heads
        self.weight = model.get_input_embeddings().weight  # [V, d]
        self.dtype = dtype or self.weight.dtype
        self.cuda = self.fixed = self.weight.device.type == "cuda"  # fixed: few step sizes (a test sets it on CPU)
        self.refresh()

    def refresh(self):
        """Free packed weights and cache; the next generate packs the module's current weights."""
        self.blocks, self.head, self.norm, self.table, self.cache, self.graphs = [], None, None, None, None, {}
        self.slots = self.columns = 0

    def _pack(self):
        join, norm = partial(pack, self.dtype), lambda m: whole(m.weight).to(self.dtype)
        for layer in self.text.layers:
            a, m = layer.self_attn, layer.mlp
            qk_norm = torch.cat([norm(a.q_norm).expand(self.heads, -1), norm(a.k_norm).expand(self.kv, -1)]) \
                if hasattr(a, "q_norm") else None  # [H + KV, D]
            self.blocks.append((norm(layer.input_layernorm), join(a.q_proj, a.k_proj, a.v_proj), qk_norm, join(a.o_proj),
                                norm(layer.post_attention_layernorm), join(m.gate_proj, m.up_proj), join(m.down_proj)))
        self.head, self.norm = join(self.model.get_output_embeddings()), norm(self.text.norm)
        self.table = whole(self.model.get_input_embeddings().weight).to(self.dtype)  # [V, d]

    def _reserve(self, columns, rows):
        """Allocate cache and per-slot state, unless those of the last call are large enough."""
        columns, slots, device = max(self.max_length or columns, self.columns), self.max_slots or 64, self.weight.device
        like = torch.empty(0, dtype=self.dtype, device=device)
        sections = getattr(self.text.rotary_emb, "mrope_section", None)  # vision: the position's axis that turns a channel
        positions = torch.arange(columns, device=device)[None]  # [1, columns]
        cos, sin = self.text.rotary_emb(like, positions.expand(3, 1, -1) if sections else positions)  # [1, columns, D]
        dim, layers = cos.shape[-1], self.config.num_hidden_layers
        if self.max_slots is None and self.cuda:  # logits and their copies take about 24 bytes per slot and word
            slot_bytes = 2 * columns * layers * self.kv * dim * self.dtype.itemsize + 24 * len(self.weight)
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            slots = max(self.slots, int(0.8 * free / slot_bytes), 1)
        if min(slots, rows) <= self.slots and columns <= self.columns:
            return
        self.slots, self.columns, self.graphs, self.cache = max(self.slots, min(slots, rows)), columns, {}, None

        new = partial(torch.zeros, device=device)
        self.cache = new(layers, 2, self.slots, self.kv, columns, dim, dtype=self.dtype)
        self.token, self.pos, self.stop, self.shift = new(4, self.slots, dtype=torch.long)
        self.live, self.ids = new(self.slots, dtype=torch.bool), new(self.slots, columns, dtype=torch.long)
        self.logprobs, self.u = new(2, self.slots, columns, dtype=torch.float)  # u: the number that picks a token
        self.slot, self.column = (torch.arange(count, device=device) for count in (self.slots, columns))
        self.is_end = new(len(self.weight), dtype=torch.bool)
        self.is_end[self.eos_ids] = True
        # [columns, D]; "rotate half" flips the sign of its first half, which the sine takes over
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :dim // 2], sin[0, :, dim // 2:]], -1)
        self.axis = sections and torch.arange(3, device=device).repeat_interleave(torch.tensor(sections, device=device)).repeat(2)

    def _norm(self, x, weight):
        eps = self.config.rms_norm_eps
        if is_cpu_fp32(x):  # half the time of F.rms_norm
            return x * (torch.linalg.vecdot(x, x) / x.shape[-1] + eps).rsqrt_()[..., None] * weight
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight

    def _rotary(self, pos):
        """Positions [N] -> cosine and sine [N, 1, D], the sine with the signs of "rotate half". [3, N]: one of each axis."""
        cos, sin = self.cos[pos], self.sin[pos]
        if pos.dim() == 2:  # rows with images: every channel is turned by the axis that owns it
            cos, sin = (table.gather(0, self.axis.expand(1, pos.shape[1], -1))[0] for table in (cos, sin))
        return cos[:, None], sin[:, None]

    def _layers(self, x, rotary, attend):
        """Tokens x [N, d] -> hidden [N, d]. attend: queries [N, H, D], keys and values [N, KV, D], layer -> [N, H, D]."""
        cos, sin = rotary
        for i, (norm1, qkv, qk_norm, out, norm2, gate_up, down) in enumerate(self.blocks):
            # contiguous: where `linear` left its product transposed
            y = linear(self._norm(x, norm1), qkv).contiguous().view(len(x), -1, cos.shape[-1])  # [N, H + 2 KV, D]
            qk, v = y.split([self.heads + self.kv, self.kv], 1)
            qk = qk if qk_norm is None else self._norm(qk, qk_norm)
            qk = torch.addcmul(qk * cos, qk.roll(cos.shape[-1] // 2, -1), sin)
            x = x + linear(attend(qk[:, :self.heads], qk[:, self.heads:], v, i).reshape(len(x), -1), out).contiguous()
            gate, up = linear(self._norm(x, norm2), gate_up).chunk(2, -1)  # [N, ffn] each
            x = x + linear(F.silu(gate) * up, down).contiguous()
        return x

    def _prefill(self, first, x, rope=None):
        """Fill the cache of the n slots from `first` on with the right-padded embeddings x [n, T, d]. rope: their rotary
        positions [3, n, T], where those are not their columns."""
        (n, T), shape = x.shape[:2], (*x.shape[:2], -1, self.cos.shape[1])

        def attend(q, k, v, layer):
            q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))  # [n, heads, T, D]
            self.cache[layer, 0, first:first + n, :, :T], self.cache[layer, 1, first:first + n, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        self._layers(x.flatten(0, 1), self._rotary(self.column[:T].repeat(n) if rope is None else rope.flatten(1)), attend)

    def _step(self, n, width, sampling):
        """Read one token in each slot < n, sample and note the next: fixed shapes, in place, no sync with the host."""
        slot, pos, live = self.slot[:n], self.pos[:n], self.live[:n]
        future = self.column[:width] > pos[:, None]  # [n, width]
        mask = torch.zeros_like(future, dtype=self.cache.dtype).masked_fill_(future, -torch.inf)
        mask = mask[:, None, None].expand(-1, -1, self.heads // self.kv, -1)  # [n, 1, G, width], G = H / KV
        dim = self.cache.shape[-1]
        place = ((slot[:, None] * self.kv + self.column[:self.kv]) * self.columns + pos[:, None]).flatten()  # [n KV]

        def attend(q, k, v, layer):
            keys, values = self.cache[layer]  # [slots, KV, columns, D]
            keys.view(-1, dim)[place], values.view(-1, dim)[place] = k.reshape(-1, dim), v.reshape(-1, dim)
            keys, values = keys[:n, :, :width], values[:n, :, :width]
            # The G heads that share a key head stand where query positions would: no copies of keys.
            q = q.reshape(n, self.kv, -1, dim)  # [n, KV, G, D]
            if is_cpu_fp32(q):  # for one query a little faster than the fused kernel
                return (q @ keys.mT * dim ** -0.5 + mask).softmax(-1) @ values
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

        rotary = self._rotary(pos if self.axis is None else pos + self.shift[:n])  # behind an image positions lag columns
        x = self._layers(F.embedding(self.token[:n], self.table), rotary, attend)  # [n, d]
        logits = linear(self._norm(x, self.norm), self.head)  # [n, V]
        token, logprob = sample(logits, self.u[slot, pos], sampling)
        self.ids[slot, pos], self.logprobs[slot, pos], self.token[:n] = token, logprob, token
        pos += live  # an ended row stands still, writing behind its completion, until it is retired
        live &= ~self.is_end[token] & (pos < self.stop[:n])

    def _run(self, n, width, sampling):
        """One step. On CUDA, a size's first one runs eagerly (loading kernels), the second is captured and replayed."""
        if self.fixed:
            n, width = min(self.slots, 1 << (n - 1).bit_length()), min(self.columns, -(-width // 256) * 256)
        size = (n, width, sampling)
        if not self.cuda or size not in self.graphs:
            self.graphs.update({size: None} if self.cuda else {})
            return self._step(*size)
        if self.graphs[size] is None:
            pool = next((graph.pool() for graph in self.graphs.values() if graph), None)  # they take turns: one memory
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(*size)
            self.graphs[size] = graph
        self.graphs[size].replay()

    def _admit(self, new, jobs, sampling):
        """Put the jobs `new` into the slots behind those of `jobs`, and append them there."""
        donor = {job.key: slot for slot, job in enumerate(jobs)}  # who holds a prompt; live rows still do
        first, fresh, copies = len(jobs), [], []
        for job in new:
            (copies if job.key in donor else fresh).append(job)
            donor.setdefault(job.key, first + len(fresh) - 1)
        jobs += fresh + copies
        for group in micro_batches([job.length for job in fresh], 16384 if self.cuda else 512):
            rows = [fresh[i] for i in group]  # neighbours, as the queue is sorted by length
            ids, prefixes, images = zip(*((job.prompt[:-1], job.prefix, job.image) for job in rows))
            x = embed_rows(self.table, ids, prefixes, visual_rows(self.model, ids, images))  # [n, T, d]
            if x.shape[1]:  # what right pads write is overwritten before it is read
                self._prefill(first + group[0], x, rope_positions(self.model, ids, prefixes, images, x.shape[1]))
        width, behind, taken = max(job.length for job in new), first + len(fresh), slice(first, len(jobs))
        self.cache[:, :, behind:len(jobs), :, :width] = self.cache[:, :, [donor[job.key] for job in copies], :, :width]
        last, length, seed, shift = self.pos.new_tensor([(job.prompt[-1], job.length, job.seed, rope_shift(self.model, job.image))
                                                         for job in jobs[first:]]).T
        self.token[taken], self.pos[taken], self.live[taken], self.shift[taken] = last, length - 1, True, shift
        self.stop[taken] = length - 1 + sampling.max_new_tokens
        self.u[taken] = uniform(seed[:, None], self.column - length[:, None] + 1)  # [new, columns]

    def _retire(self, jobs, results, width):
        """Note ended rows' completions and close the gaps -> live jobs, the longest one's position (width, if none ended)."""
        live = self.live[:len(jobs)].tolist()
        if all(live):
            return jobs, width
        pos = self.pos[:len(jobs)].tolist()
        for slot, job in enumerate(jobs):
            if not live[slot]:
                ids, logprobs = (t[slot, job.length - 1:pos[slot]].tolist() for t in (self.ids, self.logprobs))
                results[job.row] = Completion(ids, logprobs, "stop" if ids[-1] in self.eos_ids else "length")
        n, width = sum(live), max((p for p, alive in zip(pos, live) if alive), default=0)
        holes, movers = [s for s in range(n) if not live[s]], [s for s in range(n, len(jobs)) if live[s]]
        if holes:
            self.cache[:, :, holes, :, :width] = self.cache[:, :, movers, :, :width]
            for state in (self.token, self.pos, self.stop, self.shift, self.live, self.ids, self.logprobs, self.u):
                state[holes] = state[movers]
        for hole, mover in zip(holes, movers):
            jobs[hole] = jobs[mover]
        return jobs[:n], width

    @torch.inference_mode()
    def generate(self, prompts, prefixes=None, sampling=Sampling(), seeds=None, progress=None):
        """One Completion per prompt (a list of tokens), in the order given. prefixes: [L, d] or None per row; seeds: an
        int per row (None: from torch's generator); progress: called with the number of rows that just ended."""
        seeds = torch.randint(2 ** 62, (len(prompts),)).tolist() if seeds is None else seeds
        queue, results, jobs, width = [], [None] * len(prompts), [], 0
        images = images_of(prompts)
        for row, prefix in enumerate(check_rows(self.model, prompts, prefixes, seeds)):
            length = len(prefix) + len(prompts[row])
            key = tuple(prompts[row]), id(images[row]), prefix.float().cpu().numpy().tobytes()
            queue.append(Job(row, prompts[row], prefix, length, key, seeds[row] % 2 ** 63, images[row]))
            if self.max_length and length + sampling.max_new_tokens > self.max_length:
                raise ValueError(f"row {row} has {length} positions and may add {sampling.max_new_tokens}, beyond "
                                 f"max_length = {self.max_length}: shorten it, or change max_new_tokens or max_length.")
        queue = deque(sorted(queue, key=lambda job: (-job.length, job.key)))  # similar lengths together, and groups
        if not self.blocks:
            self._pack()
        self._reserve(max((job.length for job in queue), default=0) + sampling.max_new_tokens, len(queue))
        while queue or jobs:
            free = self.slots - len(jobs)
            if queue and free >= max(1, self.slots // 8):
                self._admit([queue.popleft() for _ in range(min(free, len(queue)))], jobs, sampling)
                width = max(width, *(job.length - 1 for job in jobs))
            for _ in range(8 if self.fixed else 1):
                width += 1
                self._run(len(jobs), width, sampling)
            started = len(jobs)
            jobs, width = self._retire(jobs, results, width)
            if progress and len(jobs) < started:
                progress(started - len(jobs))
        return results

def texts_of(completions, tokenizer, stops=()):
    """(completions, texts without special tokens), each cut at the first of the `stops` strings that it holds.

    The token that completes the string is a completion's last; the text ends before the string. What was sampled after it is
    dropped with its log-probs, so the kept tokens have the probabilities they were sampled with.
    """
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    cut, texts = [], []
    for completion in completions:
        text = decode(completion.ids)
        if any(stop in text for stop in stops):
            n = next(n for n in range(1, len(completion.ids) + 1) if any(stop in decode(completion.ids[:n]) for stop in stops))
            completion = Completion(completion.ids[:n], completion.logprobs[:n], "stop")
            text = decode(completion.ids)
            text = text[:min(text.index(stop) for stop in stops if stop in text)]
        cut.append(completion)
        texts.append(text)
    return cut, texts


# ------------------------------------------------------------------------------------------------------------------------
# 3. Log-probs under a prefix, for training

class HeadLogProb(torch.autograd.Function):
    """hidden [N, d], the head's weight [V, d], targets [N] -> their log-probs [N] and the distributions' entropies [N].

    Logits exist for a chunk of rows at a time; the backward computes them again and adds up gradients chunk by chunk.
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets, sampling, with_entropy):
        logprobs, entropy = (hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(2))
        size = max(1, CHUNK // len(weight))
        ctx.chunks, ctx.sampling = [slice(a, a + size) for a in range(0, len(hidden), size)], sampling
        for rows in ctx.chunks:
            logp = shape_logits(hidden[rows] @ weight.T, sampling, targets[rows]).log_softmax(-1)  # [chunk, V]
            logprobs[rows] = logp.gather(1, targets[rows, None])[:, 0]
            if with_entropy:
                entropy[rows] = -torch.linalg.vecdot(logp.exp(), logp)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad = grad[:, None] / (ctx.sampling.temperature or 1)  # [N, 1]
        for rows in ctx.chunks:
            g = shape_logits(hidden[rows] @ weight.T, ctx.sampling, targets[rows]).softmax(-1).neg_()  # [chunk, V]
            g.scatter_add_(1, targets[rows, None], torch.ones_like(grad[rows]))  # onehot - softmax
            g = g.mul_(grad[rows]).to(weight.dtype)
            grad_hidden[rows] = g @ weight
            if grad_weight is not None:
                grad_weight.addmm_(g.T, hidden[rows])
        return grad_hidden, grad_weight, None, None, None


def completion_logprobs(model, prompts, completions, prefixes, sampling=Sampling(), with_entropy=True):
    """Log-probs [N] and entropies [N] (or None) of all N completion tokens, row after row, as `sampling` draws them.

    By the Hugging Face module, so gradients reach weights and prefixes (not through the entropy). Memory is that of
    right-padded hidden states [B, T, d], never of logits [B, T, V]; split a long batch by `micro_batches` first.
    """
    prefixes = check_rows(model, prompts, prefixes, completions)
    if not prompts:  # a row without a word to score: its gradient is zero, and a rank without rows stays in step
        prompts, completions, prefixes = [[0, 0]], [[]], check_rows(model, [[0]], None, [[]])
    # The last token is predicted but never read. Right pads follow all that counts, so causality hides them: no mask.
    table = whole(model.get_input_embeddings().weight)  # [V, d]
    ids, images = [(list(p) + list(c))[:-1] for p, c in zip(prompts, completions)], images_of(prompts)
    x = embed_rows(table, ids, prefixes, visual_rows(model, ids, images))
    positions = rope_positions(model, ids, prefixes, images, x.shape[1])
    hidden = text_model(model)(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state  # [B, T, d]
    first = [len(prefix) + len(prompt) - 1 for prefix, prompt in zip(prefixes, prompts)]
    places = [(row, first[row] + i, token) for row, c in enumerate(completions) for i, token in enumerate(c)]
    row, column, targets = torch.tensor(places, dtype=torch.long, device=x.device).reshape(-1, 3).T  # [N] each
    hidden, weight = hidden[row, column], whole(model.get_output_embeddings().weight)  # [N, d], [V, d]
    if torch.is_autocast_enabled(x.device.type):
        hidden, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (hidden, weight))
    logprobs, entropy = HeadLogProb.apply(hidden, weight, targets, sampling, with_entropy)
    return logprobs, entropy if with_entropy else None


# ------------------------------------------------------------------------------------------------------------------------
# Command line

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_sampling_flags(parser, max_new_tokens):
    """The flags on how rollouts are sampled, as Sampling and Decoder take them."""
    add_flags(parser, "sampling of rollouts",
              temperature=(1.0, "of rollouts", 0),
              top_p=(1.0, "likeliest tokens kept, by their sum; 1: all", 0),
              top_k=(0, "likeliest tokens kept, by number; 0: all", 0),
              max_new_tokens=(max_new_tokens, "longest completion", 1),
              slots=(64, "rows decoded at a time", 1),
              rollout_precision=("fp32", "of the decoder's weights and cache; bf16 halves both, samples from a slightly other "
                                 "policy (see --tis), and evaluates, too", tuple(PRECISIONS)))


def parse_args(argv=None):
    """The flags of the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, "model and question",
              model=("tiny", "hub name, folder, tiny or tiny-vl"),
              vae=(str, "VAE folder (default: runs/tiny/vae, or runs/tiny-vl/vae)"),
              prompt=(str, "the question (default: one of the tiny world)"),
              image=(str, "a picture for a vision-language model (default for tiny-vl: a drawn scene)"),
              device=("cpu", "cpu, cuda or mps"))
    add_flags(parser, "prefixes and sampling",
              source=([str], "prefix sources to show (default: none, every domain, prior, noise)"),
              length=(8, "prefix rows L", 0),
              independent=(False, "L independent latents instead of one tiled"),
              draws=(3, "prefixes drawn per source", 1),
              temperature=(0.0, "of token sampling; 0: greedy", 0),
              max_new_tokens=(64, "longest answer", 1),
              seed=(0, "seed of the draws"))
    return parser.parse_args(argv)


def main(argv=None):
    """Print answers to one question under prefixes of several sources."""
    args = parse_args(argv)
    vl = args.model == "tiny-vl" and not args.image
    row = tiny_vl_task(0, 1).test[0] if vl else {"question": "calc 7 + 2 - 3 + 1 - 2 ?", "image": args.image}
    row["question"] = args.prompt or row["question"]
    args.vae = args.vae or f"runs/{'tiny-vl' if args.model == 'tiny-vl' else 'tiny'}/vae"
    args.model = find_model(args.model)
    vae = None if args.source and set(args.source) <= {"none", "noise"} else find_vae(args.vae, args.model)
    model, tokenizer = load_policy(args.model, args.device)
    table, decoder = model.get_input_embeddings().weight.detach(), Decoder(model, end_ids(model, tokenizer))
    ids = prompt_of(row, tokenizer)
    print(f"question: {row['question']}" + (f"    gold answer: {row['answer']}" if "answer" in row else ""))
    for source in args.source or ["none", *vae.domains, "prior", "noise"]:
        draws = 1 if source == "none" and args.temperature == 0 else args.draws
        seeds = [args.seed + i for i in range(draws)]
        prefixes, _ = Palette(vae, table, source, args.length, not args.independent).draw(seeds)
        sampling = Sampling(args.temperature, max_new_tokens=args.max_new_tokens)
        completions = decoder.generate([ids] * draws, prefixes, sampling, seeds)
        for completion in completions:
            print(f"{source:>8}: {tokenizer.decode(completion.ids, skip_special_tokens=True)}")


if __name__ == "__main__":
    run_main(main, "prefix.py")
