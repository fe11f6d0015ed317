"""Shared fixtures: a small untrained policy of the tiny world, its reader, and a VAE made for it.

Nothing here downloads or trains for long; every folder is pytest's own.
"""

import sys
import threading

import pytest
import torch
from tqdm import tqdm

from tiny_world import make_model, make_reader, make_traces
from vae import VAEConfig, train_vae

torch.set_num_threads(1)  # two threads on two busy cores are many times slower than one
tqdm.monitor_interval = 0  # no thread of its own, and
# no lock shared with forked ranks: one that is killed while it draws would block all others
tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session")
def reader():
    return make_reader()


@pytest.fixture(scope="session")
def tokenizer(reader):
    return reader.tokenizer


@pytest.fixture
def model():
    """An untrained tiny Qwen3, new for every test, so that a test may train it."""
    return make_model(seed=1).eval()


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory, reader):
    """The same model as an ordinary Hugging Face folder."""
    folder = tmp_path_factory.mktemp("policy")
    make_model(seed=1).save_pretrained(folder)
    reader.save(folder)
    return folder


@pytest.fixture(scope="session")
def traces():
    return make_traces(300, seed=5)


@pytest.fixture(scope="session")
def vae(tmp_path_factory, traces, reader):
    """A VAE on the embedding table of that model."""
    config = VAEConfig(out=str(tmp_path_factory.mktemp("vae")), epochs=20)
    return train_vae(config, traces, reader, make_model(seed=1))


@pytest.fixture(autouse=True)
def task_files_of_this_test_alone():
    """rewards.load_file registers a user's file by its stem: the next test may have a namesake."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if "pytest-of-" in str(getattr(module, "__file__", None)):
            del sys.modules[name]
