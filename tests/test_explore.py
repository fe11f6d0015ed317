"""tutorials/explore.py and explore.html: the page computes what PyTorch computes, and shows it.

The page's script runs in node, and the page itself in headless Chromium, driven through a pipe (the
DevTools protocol). Where one of them is not installed its tests are skipped with the reason.
"""

import json
import math
import os
import random
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import explore
import tiny_world
from evaluate import pass_at_k
from explore import (
    STAGES,
    STYLES,
    ExploreConfig,
    folder_of,
    map_cells,
    map_of,
    packed,
    page_data,
    plane_of,
)
from prefix import embed_rows, generate_plainly, load_policy, prompt_of, text_model
from rewards import prompt_ids
from tiny_world import make_model, make_question, write_answer
from vae import VAE

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
CHECKS = 128  # answers of each of the two stages that the page must reproduce


@pytest.fixture(scope="module")
def root(tmp_path_factory, vae, reader):
    """A run folder of two stages with untrained weights."""
    root = tmp_path_factory.mktemp("tiny")
    for folder, change in (("base", 0.0), ("grpo-two-phase-s0", 0.01)):
        model = make_model(seed=1)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(change * torch.randn_like(parameter))
        model.save_pretrained(root / folder / "policy")
        reader.save(root / folder / "policy")
    vae.save(root / "vae")
    return root


@pytest.fixture(scope="module")
def data(root):
    return page_data(ExploreConfig(run=str(root), questions=1, checks=CHECKS))


@pytest.fixture(scope="module")
def page(data, root):
    """The page's file."""
    path = root / "palette.html"
    path.write_text(explore.page_of(data))
    return path


@pytest.fixture(scope="module")
def quick_page(data, root):
    """The same with few checks, as the real one."""
    path = root / "quick.html"
    stages = [{**stage, "checks": stage["checks"][:4]} for stage in data["stages"]]
    path.write_text(explore.page_of({**data, "stages": stages}))
    return path


# ---- what explore.py puts into the page ----------------------------------------------------------


def test_the_stages_are_the_finished_ones(root, tmp_path):
    assert [folder_of(stage, root) for stage in STAGES] == [
        root / "base",
        None,
        root / "grpo-two-phase-s0",
        None,
    ]
    with pytest.raises(ValueError, match="no finished base in .*: run python grpo.py first"):
        page_data(ExploreConfig(run=str(tmp_path)))


def test_four_stages_fit_into_6_mb(page):
    size_of_a_stage = page.stat().st_size / 2
    assert 4 * size_of_a_stage < 6e6


def test_a_weight_beyond_fp16_is_refused():
    with pytest.raises(ValueError, match="does not fit into fp16"):
        packed(torch.tensor([1e6]))


def test_a_vae_of_one_domain_has_no_map(vae):
    with pytest.raises(ValueError, match="two domains or more"):
        plane_of(VAE(width=4, domains=["math"]))


def test_the_plane_holds_what_tells_the_domains_apart(vae):
    axes = plane_of(vae)
    torch.testing.assert_close(axes @ axes.T, torch.eye(vae.latent), atol=1e-5, rtol=0)
    centred = vae.domain_mean - vae.domain_mean.mean(0)
    coordinates = centred @ axes.T
    torch.testing.assert_close(coordinates[:, 2:], torch.zeros(3, 6), atol=1e-5, rtol=0)
    first, *_, last = coordinates[:, :2]
    assert first[0] <= 0
    assert last[0].abs() < 1e-5
    assert last[1] < 0


def test_the_map_says_where_which_style_is_right(vae, monkeypatch):
    """Right of the middle all answers are math and right, left of it code and wrong."""
    axes = plane_of(vae)
    monkeypatch.setattr(vae, "decode", torch.clone)  # so that a prefix is its latent

    def answer(rows, prefixes):
        right = [float(prefix[0] @ axes[0] > 0) for prefix in prefixes]
        styles = ["math" if is_right else "code" for is_right in right]
        return None, styles, right

    lab = SimpleNamespace(vae=vae, questions=lambda family: [{}], answer=answer)
    shown = map_of(lab, "arith", 2)
    for (x, _), style, right in zip(map_cells().tolist(), shown["style"], shown["right"]):
        if abs(x) > 1:  # beyond the blur
            assert STYLES[style] == ("math" if x > 0 else "code")
            assert right == (100 if x > 0 else 0)
    assert shown["rightOverPrior"] == pytest.approx(50, abs=8)  # the cells at x = 0 are left
    assert sum(shown["stylesOverPrior"]) == pytest.approx(100, abs=2)


def test_the_checks_hold_every_source_and_length(data):
    for stage in data["stages"]:
        kinds = {(check["source"], check["length"]) for check in stage["checks"]}
        prefixes = {(source, n) for source in ("prior", "math", "noise") for n in (1, 4, 8)}
        assert kinds == {("none", 0)} | prefixes
        assert len(stage["checks"]) == CHECKS


def test_the_checks_are_what_the_plain_decoder_gives(data, root):
    model, reader = load_policy(str(root / "base"))
    explore.round_weights(model)
    vae = VAE.load(root / "vae")
    explore.round_weights(vae)
    table = model.get_input_embeddings().weight.detach()
    for check in data["stages"][0]["checks"][:12]:
        prefix = None
        if "latent" in check:
            prefix = vae.decode(torch.tensor(check["latent"])).expand(check["length"], -1)
        elif "row" in check:
            prefix = torch.tensor(check["row"]).expand(check["length"], -1)
        rows = embed_rows(model, table, [prompt_of(check, reader)], [prefix])
        [completion] = generate_plainly(model, rows, explore.GREEDY, [0], [1])
        assert completion.ids == check["ids"]


def test_the_world_finishes_a_run_with_its_page(root, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "page_data", lambda config: {"run": config.run})
    monkeypatch.setattr(explore, "page_of", str)
    assert tiny_world.finish(tmp_path).endswith(f"open in a browser: {tmp_path}/palette.html")
    assert str(tmp_path) in (tmp_path / "palette.html").read_text()
    monkeypatch.undo()
    assert tiny_world.finish(tmp_path).startswith("no page of the palette: no finished base in")


# ---- the page's functions, in node ---------------------------------------------------------------

IN_NODE = """
const fs = require("fs")
const page = fs.readFileSync(process.argv[1], "utf8")
const [, data] = page.match(/<script type="application.json" id="data">(.*?)<.script>/s)
const [, script] = page.match(/<script>(.*?)<.script>/s)
const { expression, values } = JSON.parse(fs.readFileSync(0, "utf8"))
const body = `${script}; load(data); return (${expression})`
const run = new Function("data", ...Object.keys(values), body)
console.log(JSON.stringify(run(JSON.parse(data), ...Object.values(values))))
"""


def in_node(page, expression, **values):
    """What a JavaScript expression gives, with the page's functions and these values in scope."""
    given = json.dumps({"expression": expression, "values": values})
    command = [NODE, "-e", IN_NODE, str(page)]
    result = subprocess.run(command, input=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


# The self-check that the page makes when it opens, at one go.
RUN_CHECKS = "(result => { for (const _ of checkJob(result)); return result })({})"


@needs_node
def test_in_node_all_answers_are_pytorchs(page):
    result = in_node(page, RUN_CHECKS)
    assert result["count"] == result["equal"] == 2 * CHECKS
    assert result["worst"] < 1e-3


@needs_node
def test_sampling_has_the_right_frequencies(page, root, reader):
    """Chi-square of 2,000 draws of the first word against PyTorch's probabilities."""
    model, _ = load_policy(str(root / "base"))
    explore.round_weights(model)
    question = tiny_world.load("test")[0]["question"]
    ids = torch.tensor([prompt_ids(question, reader.tokenizer)])
    with torch.no_grad():
        hidden = text_model(model)(input_ids=ids).last_hidden_state[0, -1]
        probs = model.get_output_embeddings()(hidden).softmax(-1)  # [V]

    draw = """(() => {
        const policy = new Policy(DATA.stages[0].shape, DATA.stages[0].tensors)
        const row = policy.newRow()
        let hidden
        for (const token of promptIds(readQuestion(question))) {
            hidden = policy.read(policy.embed(token), row)
        }
        const random = uniforms(1)
        return Array.from({ length: 2000 }, () => sample(policy.logits(hidden), 1, random)[0])
    })()"""
    tokens = in_node(page, draw, question=question)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    expected = 2000 * probs.double()
    is_frequent = expected >= 5  # the others count together
    counts = torch.cat([counts[is_frequent], counts[~is_frequent].sum()[None]])
    expected = torch.cat([expected[is_frequent], expected[~is_frequent].sum()[None]])
    freedom = len(counts) - 1
    assert freedom > 5
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@needs_node
def test_the_page_knows_the_world(page, tokenizer):
    """Questions, prompts, styles, judgements and steps are those of tiny_world.py."""
    rng = random.Random(0)
    asked = []
    for number in range(60):
        question = make_question(rng)
        answer = write_answer(rng, question, tiny_world.STYLES[number % 3])
        if number % 2:  # another last digit: a wrong answer in the same style
            answer = f"{answer[:-1]}{(int(answer[-1]) + 1) % 10}"
        row = {"answer": question.answer, "finish": "stop"}
        expected = {
            "operations": question.operations,
            "states": question.states,
            "prompt": prompt_ids(question.text, tokenizer),
            "style": tiny_world.style(answer),
            "right": tiny_world.judge(answer, row)["accuracy"] == 1,
        }
        asked.append({"text": question.text, "answer": answer, "expected": expected})

    read = """asked.map(({ text, answer }) => {
        const question = readQuestion(text)
        const judged = judge({ ids: answer.split(" ").map(idOf), finish: "stop" }, question)
        const steps = stepsOf(answer, question, true)
        const { operations, states } = question
        const { style, right } = judged
        const stepsRight = steps.map(step => step.right)
        return { operations, states, prompt: promptIds(question), style, right, stepsRight }
    })"""
    for question, found in zip(asked, in_node(page, read, asked=asked)):
        *before, last = found.pop("stepsRight")
        assert found == json.loads(json.dumps(question["expected"]))
        assert all(before), question
        assert last == question["expected"]["right"], question


@needs_node
@pytest.mark.parametrize(
    "answer, wrong",
    [
        ("then we 7 + 2 = 9 next we 9 - 3 = 6 then we 6 + 1 = 7 so we 7 - 2 = 5 so 5", []),
        ("then we 7 + 2 = 8 next we 8 - 3 = 5 so 5", ["then we 7 + 2 = 8", "next we 8 - 3 = 5"]),
        ("then we 7 + 1 = 8 so 7", ["then we 7 + 1 = 8", "so 7"]),
        ("x := 7 + 2 ; run x := 9 ; call x - 3 ; return 7", ["call x - 3 ; return 7"]),
    ],
)
def test_a_wrong_step_is_marked(page, answer, wrong):
    question = "readQuestion('calc 7 + 2 - 3 + 1 - 2 ?')"
    steps = in_node(page, f"stepsOf(answer, {question}, true)", answer=answer)
    assert [" ".join(step["chunks"]) for step in steps if not step["right"]] == wrong


@needs_node
@pytest.mark.parametrize(
    "text, message",
    [
        ("calc 7 + two - 3 + 1 - 2 ?", "“two” is not among the 131 words"),
        ("calc 7 + 2 ?", "a question reads “calc"),
        ("take list 1 2 do rev rev rev rev ?", "a question reads “calc"),
    ],
)
def test_a_question_that_cannot_be_read_is_named(page, text, message):
    said = in_node(
        page, "(() => { try { readQuestion(text) } catch (e) { return e.message } })()", text=text
    )
    assert message in said


@needs_node
def test_pass_at_k_is_that_of_the_tables(page):
    tries = [(right, k) for right in (0, 1, 5, 31, 32) for k in (1, 4, 32)]
    found = in_node(page, "tries.map(([right, k]) => passAtK(32, right, k))", tries=tries)
    assert found == pytest.approx([pass_at_k(32, right, k) for right, k in tries], abs=1e-9)


# ---- the page itself, in headless Chromium -------------------------------------------------------

CHROMIUM_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--remote-debugging-pipe"
)
TROUBLE = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


class Browser:
    """A headless Chromium with one page, which speaks JSON over two pipes, a zero byte after each
    message. events: what the page has told without being asked."""

    def __init__(self, profile):
        command_end, self.commands = os.pipe()
        self.messages, message_end = os.pipe()
        # the browser reads commands from file 3 and writes messages to file 4
        flags = f"{CHROMIUM_FLAGS} --user-data-dir={profile}"
        line = f"exec {CHROMIUM} {flags} about:blank 3<&{command_end} 4>&{message_end}"
        ends = (command_end, message_end)
        self.process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=ends, stderr=subprocess.DEVNULL
        )
        for end in ends:
            os.close(end)
        self.text = b""
        self.number = 0
        self.events = []
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Performance.enable", timeDomain="threadTicks")

    def read(self):
        """The next message."""
        while b"\0" not in self.text:
            piece = os.read(self.messages, 2**16)
            assert piece, "chromium has ended"
            self.text += piece
        message, _, self.text = self.text.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        """The result of a method of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                return answer["result"]
            self.events.append(answer)

    def open(self, url, width=1280, script=True):
        """Load a page in a window of this width, and wait until it has answered."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        for address in ("about:blank", url):  # where only the part behind # differs, nothing loads
            self.events.clear()
            self.call("Page.navigate", url=address)
            while not any(event["method"] == "Page.loadEventFired" for event in self.events):
                self.events.append(self.read())
        if script:
            self.run("until(() => byId('noiseVerdict').textContent)")  # the last of the three

    def run(self, expression):
        """What a JavaScript expression gives in the page, once its promise is kept."""
        until = """const until = async isTrue => {
            while (!isTrue()) await new Promise(then => setTimeout(then, 5))
        }"""
        body = f"(async () => {{ {until}; return await ({expression}) }})()"
        params = {"expression": body, "awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", **params)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def seconds(self):
        """Processor time of the page's main thread since it was opened: a busy machine does not
        stretch it."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        [seconds] = [metric["value"] for metric in metrics if metric["name"] == "TaskDuration"]
        return seconds

    def close(self):
        self.call("Browser.close")
        self.process.wait(timeout=20)
        os.close(self.commands)
        os.close(self.messages)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@needs_chromium
def test_in_chromium_all_answers_are_pytorchs_and_nothing_is_asked_for(browser, page):
    browser.open(page.as_uri())
    browser.run("until(() => JOBS.has('check'))")
    browser.run("until(() => !JOBS.has('check'))")
    assert f"{2 * CHECKS} of {2 * CHECKS} answers" in browser.run("byId('checked').textContent")
    assert browser.run("performance.getEntriesByType('resource').length") == 0

    requests = []
    for event in browser.events:
        assert event["method"] not in TROUBLE, event
        if event["method"] == "Network.requestWillBeSent":
            requests.append(event["params"]["request"]["url"])
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]


@needs_chromium
def test_the_page_answers_within_a_second(browser, quick_page):
    browser.open(quick_page.as_uri())
    assert 0.01 < browser.seconds() < 1


DRAG_POINTS = 20
# Points along a line, as a pointer gives them; each is answered before the next.
DRAG = """(async () => {
    const map = byId("map")
    map.setPointerCapture = () => {}
    map.hasPointerCapture = () => true
    const box = map.getBoundingClientRect()
    for (let i = 1; i <= POINTS; i++) {
        const clientX = box.left + (box.width * i) / POINTS
        const place = { clientX, clientY: box.top + box.height / 3 }
        map.dispatchEvent(new PointerEvent(i === 1 ? "pointerdown" : "pointermove", place))
        await until(() => !JOBS.has("latent"))
    }
})()""".replace("POINTS", str(DRAG_POINTS))


@needs_chromium
def test_a_drag_is_answered_at_once(browser, quick_page):
    browser.open(quick_page.as_uri())
    browser.run("until(() => JOBS.has('check'))")
    browser.run("until(() => !JOBS.has('check'))")
    began = browser.seconds()
    browser.run(DRAG)
    assert (browser.seconds() - began) / DRAG_POINTS < 0.050

    x, y = browser.run("STATE.point.slice(0, 2)")
    assert x == pytest.approx(3)  # the map's edge
    assert y == pytest.approx(6.2 / 6, abs=0.02)
    shown = browser.run("byId('latentWords').textContent.replace(/[✓✗ ]/g, '')")
    assert shown == browser.run("textOf(LANES.latent.completion.ids).replaceAll(' ', '')")


# The longest time, in ms, in which the page did nothing but try.
TRY = """(async () => {
    let last = performance.now()
    let longest = 0
    const beat = setInterval(() => {
        longest = Math.max(longest, performance.now() - last)
        last = performance.now()
    }, 5)
    byId("try").click()
    await until(() => !JOBS.has("tries"))
    clearInterval(beat)
    return longest
})()"""


@needs_chromium
def test_the_tries_do_not_freeze_the_page(browser, quick_page):
    browser.open(quick_page.as_uri())
    began = browser.seconds()
    longest_wait = browser.run(TRY)
    assert browser.seconds() - began < 5
    assert longest_wait < 1000
    assert browser.run("document.querySelectorAll('#arms tr').length") == 4
    assert browser.run("document.querySelectorAll('#arms .mark').length") == 4 * 32


@needs_chromium
def test_the_address_holds_the_state(browser, quick_page):
    state = "stage=rl&length=3&temperature=0.5&seed=7&noise=2&point=0.5,-1"
    browser.open(f"{quick_page.as_uri()}#{state}&question=take+list+3+1+4+do+rev+inc+rot+dec+?")
    found = browser.run("({ ...STATE, point: STATE.point.slice(0, 2), question: 0 })")
    expected = {"stage": "rl", "length": 3, "temperature": 0.5, "seed": 7, "noise": 2}
    assert found == {**expected, "point": [0.5, -1], "question": 0}
    assert browser.run("byId('gold').textContent") == "1 3 4"

    browser.run("until(() => location.hash.includes('%2C'))")  # commas as the page writes them
    address = browser.run("location.href")
    browser.open(address)
    again = browser.run("({ ...STATE, point: STATE.point.slice(0, 2), question: 0 })")
    assert again == found
    for said in ("point=1,x", "stage=last", "length=2.5", "question=calc+x"):
        browser.open(f"{quick_page.as_uri()}#{said}")
        assert browser.run("byId('latentVerdict').textContent")


@needs_chromium
def test_the_keyboard_moves_the_point_and_asks(browser, quick_page):
    browser.open(f"{quick_page.as_uri()}#point=0,0")
    browser.run("byId('map').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    assert browser.run("STATE.point[0]") == pytest.approx(0.1)
    browser.run("byId('typed').focus()")
    browser.run("byId('typed').select()")
    browser.call("Input.insertText", text="calc 1 + 1 + 1 + 1 + one ?")
    assert "“one”" in browser.run("byId('problem').textContent")
    browser.run("byId('typed').select()")
    browser.call("Input.insertText", text="calc 1 + 1 + 1 + 1 + 1 ?")
    assert browser.run("byId('problem').textContent + byId('gold').textContent") == "5"


@needs_chromium
@pytest.mark.parametrize("width", [360, 390, 1280, 2000])
def test_nothing_is_wider_than_the_window(browser, quick_page, width):
    browser.open(quick_page.as_uri(), width)
    assert browser.run("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_without_script_the_map_is_there(browser, quick_page):
    browser.open(quick_page.as_uri(), script=False)
    document = browser.call("DOM.getDocument")["root"]["nodeId"]

    def find(selector):
        return browser.call("DOM.querySelectorAll", nodeId=document, selector=selector)["nodeIds"]

    assert len(find("#cells use")) == len(map_cells())
    assert len(find("noscript p")) == 1  # an element only where scripts are off
    [map_id] = find("#map")
    assert browser.call("DOM.getBoxModel", nodeId=map_id)["model"]["width"] > 300
