"""tutorials/reproduce.py: the reward map on questions kept aside, sweeps of one thing at a time,
learning curves, and a page that stands alone and goes on where it stopped."""

import json
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import reproduce
from evaluate import EvaluateConfig, read_samples
from reproduce import ReproduceConfig, fit_right, halves, neighbourhood_mean, running_mean
from rewards import load_task
from vae import VAE, result_settings

# ---- settings ------------------------------------------------------------------------------------


def test_defaults_depend_on_the_job():
    assert ReproduceConfig().out == "runs/reproduce"
    assert ReproduceConfig(analyse=True).out == "runs/tiny/evaluation"
    assert ReproduceConfig(analyse=True).arms == ["all"]
    assert ReproduceConfig(analyse=True, arms=["math"]).arms == ["math", "latent"]
    swept = ReproduceConfig(sweep=["length=1,2"])
    assert swept.arms == ["sampling", "latent", "latent + sampling"]
    assert ReproduceConfig(sweep=["length=1,2"], arms=["latent"]).arms == ["latent"]


def test_an_analysis_is_an_evaluation_of_the_same_settings():
    """So that its arms can be gone on with by evaluate.py, and the other way round."""
    analysed = reproduce.ReproduceConfig(analyse=True, out="x", seeds=[5], quick=True)
    plain = EvaluateConfig(out="y")
    assert result_settings(analysed) == result_settings(plain)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"sweep": ["width=3"]}, "--sweep takes AXIS=V,V with an axis of length, beta"),
        ({"sweep": ["length=x"]}, "'x' is no value for length"),
        ({"sweep": ["length=1.5"]}, "'1.5' is no value for length"),
        ({"sweep": ["length="]}, "'' is no value for length"),
        ({"sweep": ["length=2,-1"]}, "--length must be at least 0, not -1"),
        ({"sweep": ["beta=-1"]}, "--beta must be at least 0, not -1"),
        ({"sweep": ["temperature=nan"]}, "--temperature must be at least 0, not nan"),
        ({"sweep": ["top_p=1,1.5"]}, "top_p=1.5"),
        ({"sweep": ["beta=1"], "vae": "none"}, "--sweep beta needs a VAE"),
        ({"sweep": ["length=1"], "analyse": True}, "jobs of their own: give one"),
        ({"curves": ["x"], "analyse": True}, "jobs of their own: give one"),
        ({"analyse": True, "independent": True}, "--analyse needs a VAE and one latent a sample"),
        ({"analyse": True, "vae": "none"}, "--analyse needs a VAE and one latent a sample"),
        ({"analyse": True, "length": 0}, "--analyse needs a VAE and one latent a sample"),
    ],
)
def test_settings_that_cannot_be_right(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ReproduceConfig(**settings)


# ---- the reward map ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis(tmp_path_factory, policy_folder, vae):
    """One small evaluation of every arm with its analysis: settings, folder, figures."""
    pytest.importorskip("matplotlib", reason='the pictures need the extra "plots"')
    root = tmp_path_factory.mktemp("analysis")
    vae.save(root / "vae")
    config = ReproduceConfig(
        analyse=True,
        model=str(policy_folder),
        vae=str(root / "vae"),
        questions=4,
        samples=8,
        max_new_tokens=6,
        device="cpu",
        out=str(root / "out"),
    )
    figures = reproduce.analyse(config)
    return SimpleNamespace(config=config, out=root / "out", figures=figures)


def table_of(folder):
    return json.loads((folder / "analysis.json").read_text())["table"]


def test_the_analysis_compares_on_questions_kept_aside(analysis):
    head, *rows = table_of(analysis.out)
    assert [row[0] for row in rows] == ["tiny/arith (1)"] * 4 + ["tiny/list (1)"] * 4
    arms = [row[1] for row in rows[:4]]
    assert arms[0] == "latent"
    assert arms[1].removeprefix("domain ") in ("code", "math", "qa")
    assert arms[2:] == ["right answers", "best latent, one sample"]
    assert {len(row) for row in rows} == {len(head)}
    assert (analysis.out / "analysis.md").read_text().count("\n") == 2 + len(rows)
    assert (analysis.out / "reward_map.png").stat().st_size > 1000
    assert set(analysis.figures) == {"tiny", "tiny/arith", "tiny/list"}


def test_questions_to_learn_from_and_questions_kept_aside_are_different_ones():
    parts = halves(load_task("tiny", splits=("test",)), 9)
    assert [part.name for part in parts] == ["tiny/arith", "tiny/list"]
    rows = []
    for part in parts:
        rows += [*part.learnt, *part.kept_aside]
        assert 0 <= len(part.learnt) - len(part.kept_aside) <= 1
    assert sorted(rows) == list(range(9))  # each once


def test_the_map_holds_the_latents_of_the_questions_to_learn_from(analysis, vae, model):
    """Where its share is 1, it was right: z and accuracy belong to the same samples."""
    policy = SimpleNamespace(vae=vae, table=model.get_input_embeddings().weight.detach())
    part = halves(load_task("tiny", splits=("test",)), 4)[0]
    results = read_samples(analysis.out)["tiny"]
    for sample in results["latent"]:
        sample["accuracy"] = float(sample["row"] == 0 and sample["sample"] == 3)
    reward_map = reproduce.map_rewards(part, results, policy, analysis.config)
    assert reward_map.z.shape == (8, vae.latent)

    question = results["latent"][0]["question"]
    palette = reproduce.Palette(vae, policy.table, "prior", 8)
    z = palette.draw(reproduce.prefix_seed(0, question, 3)).latent[0]
    assert torch.equal(reward_map.z[3], z)
    assert reward_map.share_right.tolist() == pytest.approx([1 / 8] * 8)  # fewer than 32: all


def test_regions_are_compared_on_the_questions_kept_aside_alone(analysis, vae, model, monkeypatch):
    policy = SimpleNamespace(vae=vae, table=model.get_input_embeddings().weight.detach())
    task = load_task("tiny", splits=("test",))
    part = halves(task, 4)[0]
    results = read_samples(analysis.out)["tiny"]
    for arm in ("latent", "code", "math", "qa"):
        for sample in results[arm]:
            sample["accuracy"] = float(sample["row"] in part.kept_aside)
    for sample in results["qa"]:  # the best domain is chosen by the others, where it was right
        sample["accuracy"] = float(sample["row"] in part.learnt)

    asked = []

    def answer(policy, task, rows, palette, samples, config):
        asked.append((rows, palette.source, samples))
        return reproduce.samples_of(results, "greedy", part.kept_aside)

    monkeypatch.setattr(reproduce, "answer_greedily", answer)
    reward_map = reproduce.map_rewards(part, results, policy, analysis.config)
    records = reproduce.compare_regions(part, reward_map, task, results, policy, analysis.config)
    rows = [task.test[number] for number in sorted(part.kept_aside)]
    assert asked == [(rows, "right answers", 8), (rows, "prior", 1)]
    pass_at_1 = {record["arm"]: record["pass@1"] for record in records}
    assert pass_at_1["latent"] == "1.000"
    assert pass_at_1["domain qa"] == "0.000"


def test_an_analysis_needs_two_questions_of_each_family(analysis, tmp_path):
    config = replace(analysis.config, questions=1, out=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="--analyse needs at least two questions of arith"):
        reproduce.analyse(config)
    assert not (tmp_path / "none").exists()


def test_the_analysis_of_several_benchmarks_is_one_table(analysis, tmp_path):
    lines = [json.dumps({"question": f"calc {i} + 1 ?", "answer": f"{i + 1}"}) for i in range(2)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    task = ["tiny", f"x={tmp_path}/x.jsonl"]
    reproduce.analyse(replace(analysis.config, task=task, arms=["latent"], out=str(out)))
    head, *rows = table_of(out)
    assert "follows domain" not in head
    assert head[-1].startswith("style")
    has_styles = {row[0]: row[-1] != "" for row in rows}
    assert has_styles == {"tiny/arith (1)": True, "tiny/list (1)": True, "x (1)": False}
    assert {len(row) for row in rows} == {len(head)}


def test_the_gaussian_of_right_latents(vae):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, vae.latent, generator=generator) * 0.3 + 2.0
    z[:, 0] += z[:, 1]  # correlated: a factor may stand the wrong way round
    fitted = fit_right(vae, z)
    factor = fitted.domain_factor[0]
    assert fitted.domains == ["right answers"]
    assert fitted.domain_mean[0] == pytest.approx(z.mean(0), abs=0.02)
    assert torch.allclose(factor.T @ factor, torch.cov(z.T), atol=0.03)
    assert vae.domains == ["code", "math", "qa"]  # left as it was


def test_few_right_latents_are_drawn_to_the_prior(vae):
    one = torch.full((1, vae.latent), 3.0)
    assert torch.allclose(fit_right(vae, one).domain_mean, one / (1 + vae.latent))
    none = fit_right(vae, one[:0])
    assert torch.equal(none.domain_mean[0], torch.zeros(vae.latent))
    assert torch.equal(none.domain_factor[0], torch.eye(vae.latent))


def test_the_mean_over_neighbours():
    two_clusters = torch.cat([torch.zeros(40, 2), torch.full((40, 2), 9.0)])
    values = torch.tensor([1.0] * 40 + [0.0] * 40)
    assert neighbourhood_mean(two_clusters, values).tolist() == values.tolist()


# ---- sweeps --------------------------------------------------------------------------------------


@pytest.fixture
def swept(analysis, tmp_path, monkeypatch):
    """The folder of a sweep, and what each of its evaluations was: (L, temperature, VAE)."""
    points = []
    original = reproduce.run_arms

    def run_arms(policy, tasks, config):
        points.append((config.length, config.temperature, policy.vae))
        return original(policy, tasks, config)

    def train(config):
        assert config.beta == 4
        shutil.copytree(analysis.config.vae, config.out)
        return VAE.load(config.out)

    monkeypatch.setattr(reproduce, "run_arms", run_arms)
    monkeypatch.setattr(reproduce, "train_vae", train)
    settings = {"vae": {}, "settings": {"model": "m", "traces": ["a=x"], "beta": 1.0}}
    monkeypatch.setattr(reproduce, "read_json", lambda path: settings)
    config = replace(
        analysis.config,
        analyse=False,
        sweep=["length=1,3", "beta=4", "temperature=0.5"],
        arms=["latent"],
        out=str(tmp_path),
    )
    reproduce.reproduce(config)
    return SimpleNamespace(out=tmp_path, points=points)


def test_a_sweep_changes_one_thing_at_a_time(swept):
    settings = [(length, temperature) for length, temperature, _ in swept.points]
    assert settings == [(1, 1.0), (3, 1.0), (8, 1.0), (8, 0.5)]
    vaes = [vae for _, _, vae in swept.points]
    assert vaes[0] is vaes[1] is vaes[3] is not vaes[2]
    for name in ("length-1", "length-3", "beta-4", "temperature-0.5"):
        assert (swept.out / name / "samples.jsonl").is_file()


def test_a_sweep_is_one_table_and_one_picture(swept):
    saved = json.loads((swept.out / "sweep.json").read_text())
    values = {axis: list(figures) for axis, figures in saved["points"].items()}
    assert values == {"length": ["1", "3"], "beta": ["4.0"], "temperature": ["0.5"]}
    rows = [row[:3] for row in saved["table"][1:]]
    assert rows == [
        ["length", "1", "latent"],
        ["length", "3", "latent"],
        ["beta", "4", "latent"],
        ["temperature", "0.5", "latent"],
    ]
    assert (swept.out / "sweep.png").stat().st_size > 1000


def test_a_vae_of_another_beta_keeps_the_other_settings(tmp_path, monkeypatch):
    settings = {"model": "m", "traces": ["a=x", "b=y"], "beta": 1.0, "lr": 0.003, "epochs": 7}
    text = json.dumps({"vae": {}, "settings": settings})
    (tmp_path / "config.json").write_text(text)
    configs = []
    monkeypatch.setattr(reproduce, "train_vae", configs.append)
    reproduce.vae_of_beta(tmp_path, tmp_path / "new", 4.0)
    (config,) = configs
    assert (config.model, config.traces, config.lr, config.epochs) == (
        "m",
        ["a=x", "b=y"],
        0.003,
        7,
    )
    assert (config.beta, config.out) == (4.0, str(tmp_path / "new"))

    (tmp_path / "config.json").write_text('{"vae": {}}')
    with pytest.raises(ValueError, match="does not say how it was trained"):
        reproduce.vae_of_beta(tmp_path, tmp_path / "new", 4.0)


# ---- learning curves -----------------------------------------------------------------------------


def write_metrics(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_running_mean_looks_back_and_has_less_to_look_at_in_the_beginning():
    assert running_mean({1: 0.0, 2: 1.0, 5: 2.0, 6: 9.0}, width=3) == {
        1: 0.0,
        2: 0.5,
        5: 1.0,
        6: 4.0,
    }
    assert running_mean({2: 1.0, 1: 0.0}, width=1) == {1: 0.0, 2: 1.0}


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are saved."""
    reason = 'the picture needs the extra "plots"'
    figure = pytest.importorskip("matplotlib.figure", reason=reason).Figure
    saved = []
    original = figure.savefig

    def savefig(self, *arguments, **options):
        saved.append(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(figure, "savefig", savefig)
    return saved


def test_learning_curves_are_means_over_seeds(tmp_path, figures):
    for name, end in (("grpo-none-s0", 0.3), ("grpo-linear-s0", 0.5), ("grpo-linear-s1", 0.7)):
        first = {"step": 0, "eval_accuracy": 0.1}
        last = {"step": 1, "reward_guided": None, "reward_unguided": 0.2, "eval_accuracy": end}
        write_metrics(tmp_path / name, [first, last])
    with open(tmp_path / "grpo-none-s0" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')  # a run that goes on may be writing

    folders = sorted(str(path) for path in tmp_path.iterdir())
    reproduce.main(["--curves", *folders])
    assert (tmp_path / "curves.png").stat().st_size > 1000
    guided, unguided, accuracy = figures[0].axes
    linear, none = accuracy.lines
    assert (linear.get_label(), none.get_label()) == ("grpo-linear (2 seeds)", "grpo-none (1 seed)")
    assert linear.get_ydata() == pytest.approx([0.1, 0.6])
    assert none.get_ydata() == pytest.approx([0.1, 0.3])
    assert [list(line.get_xdata()) for line in guided.lines] == [[], []]  # no guided rollouts
    assert [list(line.get_xdata()) for line in unguided.lines] == [[1], [1]]


def test_runs_of_two_folders_are_two_lines_and_negative_rewards_are_seen(tmp_path, figures):
    for out, reward in (("a", -0.8), ("b", 0.5)):
        for seed in (0, 1):
            row = {"step": 1, "reward_unguided": reward, "eval_accuracy": 0.3}
            write_metrics(tmp_path / out / f"grpo-none-s{seed}", [row])
    reproduce.draw_curves(sorted(tmp_path.glob("*/*")), tmp_path / "curves.png")
    _, unguided, accuracy = figures[0].axes
    labels = [line.get_label() for line in accuracy.lines]
    assert labels == ["a/grpo-none (2 seeds)", "b/grpo-none (2 seeds)"]
    low, high = unguided.get_ylim()
    assert low < -0.8
    assert high >= 1.02


# ---- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_of_the_page_is_one_its_script_accepts(quick, tmp_path):
    config = ReproduceConfig(out=str(tmp_path), base_seed=7, seeds=[3, 4], quick=quick)
    commands = reproduce.page_commands(config)
    assert {section.command for section in reproduce.SECTIONS} <= {"page", *commands}
    classes = {
        "grpo.py": grpo.GRPOConfig,
        "evaluate.py": EvaluateConfig,
        "tutorials/reproduce.py": ReproduceConfig,
    }
    for script, *argv in commands.values():
        assert (reproduce.ROOT / script).is_file()
        settings = reproduce.parse_settings(classes[script], "", argv)
        assert settings.resume
        assert settings.out.startswith(str(tmp_path))
        if script == "grpo.py":
            assert (settings.seed, settings.base_seed) == ([3, 4], 7)
            assert settings.closing_questions == 0


class Page(HTMLParser):
    """Collects tags, checks that they close in order, and keeps every address."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.addresses = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data"):
                self.addresses.append(value)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def write_curves(folder, end, steps=6):
    """A finished run's metrics, from 0.1 to the end given."""
    rows = [{"step": 0, "eval_accuracy": 0.1}]
    for step in range(1, steps):
        rows.append({"step": step, "reward_guided": step / steps, "reward_unguided": 0.2})
    rows.append({"step": steps, "reward_unguided": 0.3, "eval_accuracy": end})
    write_metrics(folder, rows)


ENDS = {"none": 0.2, "two-phase": 0.9, "linear": 0.8, "two-phase-noise": 0.9, "linear-noise": 0.2}


@pytest.fixture(scope="module")
def page(analysis, tmp_path_factory):
    """A page whose commands copy an evaluation or write curves: its folder, commands and flags."""
    out = tmp_path_factory.mktemp("page")
    commands = []

    def run(command, stdout, stderr, env):
        script = Path(command[1]).name
        commands.append(script)
        assert env["OMP_NUM_THREADS"] == "1"
        if script != "grpo.py":
            shutil.copytree(analysis.out, command[command.index("--out") + 1])
        elif "--source" not in command:  # those of noise are written with them
            algorithm = "rloo" if "rloo" in command else "grpo"
            for kind, end in ENDS.items():
                for seed in (0, 1):
                    write_curves(out / f"{algorithm}-{kind}-s{seed}", end + 0.01 * seed)
        return SimpleNamespace(returncode=0)

    argv = ["--seeds", "0", "1", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce.subprocess, "run", run)
        reproduce.main(argv)
        yield SimpleNamespace(out=out, commands=commands, argv=argv)


def test_the_page_stands_alone(page):
    text = (page.out / "index.html").read_text()
    parsed = Page(text)
    assert parsed.tags.count("img") == 5
    assert parsed.tags.count("table") == 6
    for address in parsed.addresses:
        assert address.startswith("data:image/png;base64,")
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert "url(" not in text
    assert "@import" not in text


def test_what_is_done_is_not_done_again(page):
    assert len(page.commands) == 6
    assert page.commands[0] == "grpo.py"  # it makes the base that all use
    text = (page.out / "index.html").read_text()
    reproduce.main(page.argv)
    assert len(page.commands) == 6
    assert (page.out / "index.html").read_text() == text


def test_a_command_with_other_flags_is_run_again(page):
    logs = page.out / "logs"
    record = json.loads((logs / "grpo.json").read_text())
    minutes = reproduce.run_command("grpo", record["command"], page.out)
    assert minutes == record["minutes"]
    shutil.copytree(logs, page.out / "elsewhere" / "logs")
    before = len(page.commands)
    reproduce.run_command("grpo", ["grpo.py", "--source", "noise"], page.out / "elsewhere")
    assert len(page.commands) == before + 1
    page.commands.pop()


def tables_of(page):
    """{title of a section: its table, the head first} of the page's results.json."""
    sections = json.loads((page.out / "results.json").read_text())["sections"]
    return {section["title"].partition(":")[0]: section["rows"] for section in sections}


def test_the_verdicts_of_the_page(page):
    table = tables_of(page)["Is the gain really from the latent?"]
    outcome = {row[0]: row[-1] for row in table}
    assert outcome["RL with grpo: is two-phase better than none?"] == "for"
    assert outcome["RL with rloo: is linear better than linear-noise?"] == "for"
    same = "RL with grpo: is two-phase better than two-phase-noise?"
    assert outcome[same] == "no difference shown"
    assert len(outcome) == 1 + 1 + 6 + 8


def test_one_seed_of_rl_shows_nothing(page):
    table = reproduce.page_tables(page.out, [1])["verdicts"]
    outcomes = {row[-1] for row in table if row[0].startswith("RL")}
    assert outcomes == {"one seed shows nothing"}


def test_the_papers_figures_stand_beside_ours(page):
    tables = tables_of(page)
    runs = {row[0]: row for row in tables["Table 3"]}
    assert runs["grpo none"][1] == ".212 / .583 / .601"
    assert runs["grpo two-phase-noise"][1] == ""
    assert runs["grpo none"][2:4] == ["0.100", "0.200, 0.210"]
    assert [row[0] for row in tables["Table 1"]][1:] == [
        *reproduce.PAPER_DOMAINS,
        "shuffled",
        "latent",
    ]
    arms = {row[0]: row[1] for row in tables["Table 2"]}
    assert arms["latent"] == ".721 / .731 / .731"


def test_what_steers():
    assert reproduce.steers({"math": 1.0, "code": 0.9, "shuffled": 0.4})
    assert not reproduce.steers({"math": 1.0, "code": 0.8, "shuffled": 0.4})
    assert not reproduce.steers({"math": 1.0, "code": 1.0, "shuffled": 0.9})


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.1, 0.2, "for"),
        (-0.2, -0.1, "against"),
        (-0.1, 0.2, "no difference shown"),
        (0.0, 0.1, "no difference shown"),
    ],
)
def test_a_verdict_needs_an_interval_without_0(low, high, expected):
    assert reproduce.verdict(low, high) == expected


def test_a_failed_command_is_one_sentence_and_is_run_again(tmp_path, monkeypatch):
    runs = []

    def fail(command, stdout, **_):
        runs.append(command)
        stdout.write("much before\ngrpo.py: the disk is full\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(reproduce.subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"failed \(grpo.py: the disk is full\); see .*grpo.txt"
        ):
            reproduce.main(["--out", str(tmp_path)])
    assert len(runs) == 2
    assert runs[0][0] == sys.executable
