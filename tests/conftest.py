"""Shared fixtures: a small untrained policy of the tiny world, its tokenizer, and a VAE on its embedding table.

Nothing here downloads or trains for long; every folder is pytest's own.
"""
import sys
import threading
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)        # two threads on two busy cores are many times slower than one
tqdm.monitor_interval = 0       # no thread of its own, and
tqdm.set_lock(threading.RLock())        # no lock shared with forked ranks: one that is killed while it draws would block all others


@pytest.fixture(scope="session")
def tokenizer():
    from sft import tiny_tokenizer
    return tiny_tokenizer()


@pytest.fixture
def model():
    """An untrained tiny Qwen3, new for every test, so that a test may train it."""
    from sft import tiny_model
    return tiny_model(seed=1).eval()


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory, tokenizer):
    """The same model as an ordinary Hugging Face folder."""
    from sft import tiny_model
    folder = tmp_path_factory.mktemp("policy")
    tiny_model(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def traces():
    from rewards import tiny_traces
    return tiny_traces(300, seed=5)


@pytest.fixture(scope="session")
def vae(tmp_path_factory, tokenizer, traces):
    from sft import tiny_model
    from vae import train_vae
    table = tiny_model(seed=1).get_input_embeddings().weight.detach()
    return train_vae(traces, tokenizer, table, tmp_path_factory.mktemp("vae"), epochs=20)
