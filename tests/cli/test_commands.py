"""The command line: what scripts rely on: exit codes, JSON, and messages instead of tracebacks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner, Result

from djinn.bench import machines
from djinn.bench.records import Record, read_records
from djinn.cli import main, outlook
from djinn.engine import forecast as forecasts
from djinn.places import RUNS_DIR
from djinn.planning.rates import Rates
from djinn.profiles import Profile, load_profile, profile_names
from djinn.sizes import format_bytes

PLAN = ("plan", "synthetic:llama-2-70b-16-layers", "--budget", "10 GB", "--machine", "h200_2026-11-24")


def djinn(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_help_is_instant_because_torch_is_not_imported() -> None:
    code = "import sys; from djinn.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    usage, _, modules = out.rpartition("\n") if not out.endswith("\n") else out.rstrip("\n").rpartition("\n")
    assert "Usage" in usage
    assert not {"torch", "transformers", "pandas", "deepspeed"} & set(modules.split())


def test_help_groups_the_commands() -> None:
    shown = djinn("--help").stdout
    places = [shown.index(f" {words} ") for words in ("Use", "generate", "Measure", "baseline", "Artifact", "verify")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "synthetic:llama-tiny", "--budget", "5 MB", "--machine", "l5"],
        ["plan", "synthetic:llama-tinny", "--budget", "5 MB"],
        ["plan", "nowhere", "--budget", "5 MB"],
        ["plan", "synthetic:llama-tiny", "--budget", "5 MB", "--device", "tpu"],
        ["plan", "synthetic:llama-tiny", "--budget", "5 MB", "--coding", "losless"],
        ["plan", "synthetic:llama-tiny", "--budget", "5 MB", "--figure", "plan.jpg"],
        ["generate", "synthetic:llama-tiny", "--prompt", "x", "--budget", "5"],
        ["generate", "synthetic:llama-tiny", "--prompt", "x", "--budget", "5 MB", "--device", "gpu"],
        ["pack", "synthetic:llama-tinny", "--dry-run"],
        ["baseline", "djinn", "--model", "synthetic:llama-tinny"],
        ["reproduce", "--profile", "smoke_huge"],
        ["certify", "--profile", "smoke_huge"],
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_before_torch_is_imported(arguments: list[str]) -> None:
    code = f"import sys; from djinn.cli import main; main({arguments}, standalone_mode=False); print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stderr.startswith("djinn: ")
    assert not {"torch", "transformers", "pandas", "papermill"} & set(finished.stdout.split())


def test_a_named_machines_gpu_has_its_memory() -> None:
    from djinn.cli import outlook

    names = ("L4", "a100-sxm", "h100-70b_2026-11-25", "2-cores_2026-11-25")
    found = [outlook.machine(name, None).memory_bytes for name in names]
    assert found == [24 * 2**30, 80 * 2**30, 85_017_493_504, None]


def test_profiles_as_json() -> None:
    result = djinn("profiles", "--json")
    assert result.exit_code == 0
    assert [each["name"] for each in json.loads(result.stdout)] == profile_names()


def test_profiles_for_people() -> None:
    result = djinn("profiles")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in profile_names())
    assert "…" not in result.stdout  # nothing is cut short
    assert len(result.stdout.splitlines()) <= 1 + 2 * len(profile_names())  # in 80 columns


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["certify", "--profile", "smoke_huge"], "no profile 'smoke_huge'; the profiles are"),
        (["sweep", "--profile", "nowhere.yaml"], "no profile 'nowhere.yaml'"),
        (["baseline", "vllm"], "no system 'vllm'; the systems are"),
        (["baseline", "djinn", "--budget", "24"], "size '24' is not a positive number with a unit"),
        (["baseline", "djinn", "--budget", "-24 GB"], "size '-24 GB' is not a positive number with a unit"),
        (["plan", "synthetic:llama-9", "--budget", "5 MB"], "no architecture 'llama-9'"),
        (["plan", "synthetic:llama-tiny", "--budget", "5"], "size '5' is not a positive number with a unit"),
        (["plan", "synthetic:llama-tiny", "--budget", "5 KB"], "budget: 5 KB is too small"),
        (["plan", "synthetic:llama-tiny", "--budget", "5 MB", "--machine", "l5"], "no machine 'l5'; the machines are"),
        (["plan", "synthetic:llama-tiny", "--budget", "5 MB", "--device", "tpu"], "device 'tpu': the devices are"),
        ([*PLAN, "--device", "cpu"], "the rates of h200_2026-11-24 are those of device cuda"),
        (["pack", "synthetic:llama-tiny", "--dry-run", "--device", "tpu"], "device 'tpu': the devices are"),
        (
            ["pack", "synthetic:llama-tiny", "--dry-run", "--device", "cuda:x"],
            "device 'cuda:x': the devices are cpu and cuda",
        ),
        (["generate", "nowhere", "--prompt", "x", "--budget", "5 MB"], "no folder 'nowhere'"),
        (["generate", "synthetic:llama-tiny", "--prompt", "x", "--budget", "5 MB", "--coding", "zip"], "coding 'zip'"),
        (["pack", "nowhere", "--dry-run"], "no folder 'nowhere'"),
        (["pack", "synthetic:llama-tiny"], "name the folder to write, or say --dry-run"),
        (["baseline"], "Missing argument"),
        (["baseline", "djinn", "--runs", "0"], "--runs"),
        (["sing"], "No such command"),
    ],
)
def test_bad_input_is_one_message_and_code_2(arguments: list[str], said: str) -> None:
    result = djinn(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_script_sees_no_traceback_either() -> None:
    command = [sys.executable, "-c", "from djinn.cli import main; main()", "certify", "--profile", "smoke_huge"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == 2
    assert finished.stderr.startswith("djinn: no profile")
    assert finished.stdout == ""


def test_plan_as_json_accounts_for_every_byte() -> None:
    result = djinn("plan", "synthetic:llama-tiny", "--budget", "5 MB", "--prompt-tokens", "8", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["resident_bytes"] + plan["ring_bytes"] + plan["workspace_bytes"] <= plan["budget"] == 5_000_000
    assert sum(unit["bytes"] for unit in plan["units"]) == plan["model_bytes"]


def test_plan_for_a_machine_that_is_not_here(tmp_path: Path) -> None:
    shown = djinn(*PLAN, "--figure", str(tmp_path / "plan.png"))
    assert shown.exit_code == 0, shown.output
    assert "predicted for h200_2026-11-24, link 55.5 GB/s, disk 2.09 GB/s" in shown.stdout
    assert "one more GB of budget saves 0.018" in shown.stdout
    assert "taken to be free: compute, host" in shown.stdout
    assert {path.name for path in tmp_path.glob("plan.*")} >= {"plan.png", "plan.pdf", "plan.csv"}
    plan = json.loads(djinn(*PLAN, "--batch", "4", "--json", "--figure", str(tmp_path / "four.pdf")).stdout)
    assert plan["device"] == "cuda"
    assert plan["predicted"]["limit"] == "link"
    assert [choice["batch"] for choice in plan["batches"]] == [1, 2, 4, 8, 16, 32]
    same = next(choice for choice in plan["batches"] if choice["batch"] == 4)
    assert {key: same[key] for key in plan["predicted"]} == plan["predicted"]
    assert next(point for point in plan["budgets"] if point["budget"] == plan["budget"])["limit"] == "link"


def test_plan_for_a_card_of_which_there_is_a_data_sheet_alone() -> None:
    large = ("plan", "synthetic:llama-2-70b-16-layers", "--budget", "10 GB")
    shown = djinn(*large, "--machine", "l4")
    assert shown.exit_code == 0, shown.output
    assert "predicted for l4 (data sheet, not measured), link 31.5 GB/s" in shown.stdout
    assert "host memory is taken to be enough there" in shown.stdout
    given = json.loads(djinn(*large, "--machine", "L4", "--link", "15.75 GB/s", "--ram", "64 GB", "--json").stdout)
    assert given["machine"] == "L4 (data sheet, not measured), with the given rates"
    assert given["note"] == ""
    sheet = json.loads(djinn(*large, "--machine", "L4", "--json").stdout)
    assert given["predicted"]["link_s"] == pytest.approx(2 * sheet["predicted"]["link_s"])


def test_plan_from_rates_alone_is_for_a_gpu_and_reads_from_disk_what_memory_does_not_hold() -> None:
    rates = ("--link", "25 GB/s", "--disk", "7 GB/s", "--ram", "16 GB")
    plan = json.loads(djinn("plan", "synthetic:llama-2-70b-16-layers", "--budget", "10 GB", *rates, "--json").stdout)
    assert plan["device"] == "cuda"
    assert 0 < plan["pinned_bytes"] <= 16 * 10**9
    assert plan["predicted"]["disk_s"] == pytest.approx(plan["disk_bytes"] / 7e9)
    assert plan["predicted"]["not_measured"] == ["compute", "host"]


def test_beside_a_link_that_is_given_the_cores_have_not_been_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(device="cuda", link=55e9, link_beside_cores=44e9, cores_beside_link=100e9, cores_tokens=8)
    known = outlook.Machine(name="there", device="cuda", rates=rates, free=None)
    monkeypatch.setattr(outlook, "_named", lambda *_: known)
    for told, measured in ({}, True), ({"disk": "7 GB/s"}, True), ({"link": "10 GB/s"}, False):
        found = outlook.machine("there", None, **told).rates
        assert found is not None
        assert (found.host is not None) is measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_plan_that_this_machine_cannot_hold_is_one_for_a_gpu_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "usable_ram", lambda: 4 * 10**9)
    large = ("plan", "synthetic:llama-2-70b-16-layers", "--budget", "10 GB")
    shown = djinn(*large)
    assert shown.exit_code == 0, shown.output
    assert "this machine has no GPU and too little memory for that budget" in shown.stdout
    here = djinn(*large, "--device", "cpu")
    assert here.exit_code == 2
    assert "host memory" in here.stderr
    small = djinn("plan", "synthetic:llama-tiny", "--budget", "5 KB")
    assert "budget: 5 KB is too small" in small.stderr, "which no other machine changes"


def test_plan_for_a_machine_that_nobody_certified_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "RUNS_DIR", tmp_path)
    arguments = ["plan", "synthetic:llama-tiny", "--budget", "5 MB", "--prompt-tokens", "8", "--device", "cpu"]
    shown = djinn(*arguments)
    assert shown.exit_code == 0
    assert "the largest batch that fits is" in shown.stdout
    assert "no times: no rates" in shown.stdout
    assert "djinn certify" in shown.stdout
    assert djinn(*arguments, "--figure", str(tmp_path / "plan.pdf")).exit_code == 2


def test_pack_says_what_it_saves_and_unpack_gives_it_back(codable_checkpoint: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "packed", tmp_path / "back"
    would = djinn("pack", str(codable_checkpoint), "--dry-run", "--json", "--device", "cpu")
    assert would.exit_code == 0
    assert not packed.exists()
    shown = djinn("pack", str(codable_checkpoint), str(packed), "--device", "cpu")
    assert shown.exit_code == 0
    assert "up_proj" in shown.stdout
    assert json.loads(djinn("pack", str(packed), "--dry-run", "--json").stdout) == json.loads(would.stdout)
    assert djinn("unpack", str(packed), str(back), "--device", "cpu").exit_code == 0
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in codable_checkpoint.iterdir()
    }


@pytest.mark.slow
def test_generate_streams_and_says_how_fast(tiny_checkpoint: Path) -> None:
    """In processes of its own: without a GPU the peak is a process's growth, and an older one has grown already."""

    def generated(*options: str) -> subprocess.CompletedProcess[str]:
        told = ["generate", str(tiny_checkpoint), "--prompt", "Hello", "--budget", "5 MB", "--new-tokens", "4"]
        start = [sys.executable, "-m", "djinn", *told, "--device", "cpu", *options]
        return subprocess.run(start, capture_output=True, text=True, timeout=300)

    shown, quiet = generated(), generated("--json")
    assert shown.returncode == quiet.returncode == 0, shown.stderr + quiet.stderr
    assert "tokens/s, effective bandwidth" in shown.stderr
    measured = json.loads(quiet.stdout)
    assert 1 <= measured["new_tokens"] <= 4
    assert measured["text"].strip() in shown.stdout
    assert measured["effective_gbps"] > 0
    assert measured["link_gbps"] > 0
    assert 0 < measured["peak_device_bytes"] < 200e6  # libraries' own memory is much of that of so small a model
    assert re.search(r"peak device memory [\d.]+ MB, above the budget of 5 MB: without a GPU", shown.stderr)
    assert "limited by: " in shown.stderr
    assert set(measured["shares"]) == {"link", "disk", "host", "compute"}
    assert sum(measured["shares"].values()) == pytest.approx(1)
    assert measured["shares"][measured["limit"]] == max(measured["shares"].values())


@pytest.mark.slow
def test_generate_over_several_ranks_prints_once(tiny_checkpoint: Path) -> None:
    """It starts them itself; one speaks for all, and their exit code is the command's."""

    def in_ranks(budget: str) -> subprocess.CompletedProcess[str]:
        told = [
            "generate",
            str(tiny_checkpoint),
            "--prompt",
            "Hello",
            "--budget",
            budget,
            "--new-tokens",
            "4",
            "--json",
        ]
        start = [sys.executable, "-m", "djinn", *told, "--device", "cpu", "--gpus", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(start, capture_output=True, text=True, env=environment, timeout=300)

    made = in_ranks("5 MB")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["new_tokens"] in range(1, 5)
    refused = in_ranks("5 KB")
    assert refused.returncode == 2
    assert refused.stderr.count("djinn: budget: 5 KB is too small") == 1
    assert "Traceback" not in refused.stderr


def test_a_plan_for_several_gpus_is_each_ones() -> None:
    """A laptop answers: no process is started, and no GPU is there."""
    alone, split = (json.loads(djinn(*PLAN, "--json", "--gpus", gpus).stdout) for gpus in ("1", "2"))
    assert split["model_bytes"] == pytest.approx(alone["model_bytes"] / 2, rel=0.01)
    assert split["predicted"]["token_s"] < alone["predicted"]["token_s"] / 2
    assert "sums over GPUs" in split["predicted"]["not_measured"]
    assert split["whole_model_bytes"] == alone["model_bytes"] == alone["whole_model_bytes"]
    assert split["host_memory"] == pytest.approx(alone["host_memory"], rel=1e-6)
    shown = djinn(*PLAN, "--gpus", "2").stdout
    sizes = [format_bytes(plan["model_bytes"]) for plan in (alone, split)]
    pinned = format_bytes(2 * split["pinned_bytes"])
    assert shown.startswith(f"model {sizes[0]}, {sizes[1]} on each of 2 GPUs; pinned {pinned} in all; of each GPU:")
    assert "link 55.5 GB/s each, not measured at once" in shown
    refused = djinn(*PLAN, "--gpus", "2", "--host-compute")
    assert refused.exit_code == 2
    assert "host_compute: it is for one GPU; several would share the cores of their host" in refused.stderr


def test_a_plan_says_what_it_takes_of_the_memory_there() -> None:
    shown = djinn(*PLAN, "--batch", "2").stdout
    assert "streamed weights may take 107 GB of the host memory there; --host-memory sets another limit" in shown
    assert "less than the budget" not in shown
    large = list(PLAN)
    large[large.index("10 GB")] = "200 GB"
    bound = djinn(*large).stdout
    assert "streamed weights may take" not in bound
    assert "streamed weights may take" not in djinn(*PLAN, "--host-memory", "100 GB").stdout
    assert "the GPU has 150 GB, less than the budget" in bound


@pytest.mark.parametrize(
    ("told", "cores", "brings"),
    [
        ([], "(14 cores)", "without --host-compute a token takes 0.387 s"),
        (["--host-threads", "8"], "(8 cores)", "without --host-compute a token takes 0.387 s"),
        (["--machine", "L4"], "(cores of this machine: 6; give --host-threads for another)", "without --host-compute"),
        (["--host-threads", "1"], "(1 cores)", "the host's cores are given nothing"),
    ],
)
def test_a_plan_with_host_compute_says_whose_cores_it_counts_and_what_they_bring(
    told: list[str], cores: str, brings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "choose_cpus", lambda near: tuple(range(6)))
    shown = djinn(*PLAN, "--host-compute", *told)
    assert shown.exit_code == 0, shown.output
    assert cores in shown.stdout
    assert brings in shown.stdout


@pytest.mark.slow
def test_a_terminal_shows_what_goes_on_and_standard_output_stays_as_it_is(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ["plan", str(tiny_checkpoint), "--budget", "5 MB", "--prompt-tokens", "8", "--device", "cpu", "--json"]
    plan += ["--host-memory", "1 GB"]  # by default a share of what is free, which varies
    generate = ["generate", str(tiny_checkpoint), "--prompt", "Hello", "--budget", "5 MB", "--new-tokens", "4"]
    piped = [djinn(*arguments) for arguments in (plan, generate)]
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    on_terminal = [djinn(*arguments) for arguments in (plan, generate)]
    assert [each.stdout for each in piped] == [each.stdout for each in on_terminal]
    assert piped[0].stderr == ""
    assert "reading the weights' headers" in on_terminal[0].stderr
    text, shown = piped[1].stdout.strip(), on_terminal[1].output
    assert text
    assert shown.rindex("generating") < shown.index(text)  # the line is gone before the text begins


@pytest.mark.slow
def test_generate_samples_as_it_is_told(tiny_checkpoint: Path) -> None:
    arguments = [
        "generate",
        str(tiny_checkpoint),
        "--prompt",
        "Hello",
        "--budget",
        "5 MB",
        "--new-tokens",
        "8",
        "--json",
    ]
    texts = [
        json.loads(djinn(*arguments, "--temperature", "2", "--seed", seed, "--device", "cpu").stdout)["text"]
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_goes_through_the_tokenizers_template(tiny_checkpoint: Path, tmp_path: Path) -> None:
    talking = tmp_path / "talking"
    shutil.copytree(tiny_checkpoint, talking)
    told = ["--budget", "5 MB", "--new-tokens", "3", "--json"]
    refused = djinn("generate", str(talking), "--prompt", "Hello", *told, "--chat")
    assert refused.exit_code == 2
    assert "no chat template" in refused.stderr
    (talking / "chat_template.jinja").write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    chat = djinn("generate", str(talking), "--prompt", "Hello", *told, "--chat")
    plain = djinn("generate", str(talking), "--prompt", "<Hello>", *told)
    assert chat.exit_code == plain.exit_code == 0, chat.output
    assert json.loads(chat.stdout)["text"] == json.loads(plain.stdout)["text"]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "llama-tiny"
    result = djinn("synth", "llama-tiny", "--output-dir", str(folder), "--verify")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(folder)
    return folder


class Harness(ModuleType):
    """Stands in for the harness: remembers what it was asked for and returns what it was given."""

    def __init__(self, *records: Record) -> None:
        super().__init__("djinn.bench.harness")
        self.records = list(records)

    def run_baselines(self, profile: Profile, run_dir: Path) -> list[Record]:
        self.profile, self.run_dir = profile, run_dir
        print("run 1 of 1")  # as the real one does
        return self.records


TINY = load_profile("smoke_tiny")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go below the current directory by default."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def records(fabricated_run: Path) -> list[Record]:
    """Some ok, one timed out, one out of memory."""
    return read_records(fabricated_run / "results/baselines.jsonl")


def test_baseline_overrides_the_profile(records: list[Record], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harness = Harness(records[0])
    monkeypatch.setitem(sys.modules, "djinn.bench.harness", harness)
    result = djinn(
        "baseline", "deepspeed", "--model", "synthetic:opt-tiny", "--runs", "5", "--ttft-enabled",
        "--output-dir", str(tmp_path), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (harness.profile.model, harness.profile.runs) == ("synthetic:opt-tiny", 5)
    assert harness.profile.systems == ("deepspeed:cpu",)
    assert harness.run_dir == tmp_path
    (record,) = json.loads(result.stdout)
    assert record["ttft_s"] > 0


def test_several_gpus_are_asked_of_the_profile(
    records: list[Record], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    harness = Harness(records[0])
    monkeypatch.setitem(sys.modules, "djinn.bench.harness", harness)
    assert djinn("baseline", "djinn", "--gpus", "2", "--output-dir", str(tmp_path)).exit_code == 0
    assert harness.profile.gpus == 2
    given: list[object] = []
    runner = types.ModuleType("djinn.artifact.runner")
    monkeypatch.setattr(runner, "reproduce", lambda *args, **options: given.append((args, options)), raising=False)
    monkeypatch.setitem(sys.modules, "djinn.artifact.runner", runner)
    assert djinn("reproduce", "--profile", "smoke_ranks", "--gpus", "4").exit_code == 0
    assert djinn("reproduce", "--profile", "smoke_ranks").exit_code == 0
    assert given == [
        (("smoke_ranks", None), {"verbose": False, "gpus": 4}),
        (("smoke_ranks", None), {"verbose": False}),
    ]


@pytest.mark.parametrize(
    ("system", "systems"),
    [("all", TINY.systems), ("djinn", ("djinn",)), ("deepspeed:nvme", ("deepspeed:nvme",))],
)
def test_baseline_chooses_systems(
    system: str, systems: tuple[str, ...], records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(records[0])
    monkeypatch.setitem(sys.modules, "djinn.bench.harness", harness)
    assert djinn("baseline", system).exit_code == 0
    assert harness.profile.systems == systems
    own = {"all": "smoke_tiny", "djinn": "smoke_tiny-djinn", "deepspeed:nvme": "smoke_tiny-deepspeed-nvme"}
    assert harness.run_dir == RUNS_DIR / own[system]
    assert load_profile(harness.run_dir / "profile.yaml").systems == systems


def test_a_run_that_did_not_succeed_is_code_1_with_its_reason(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "djinn.bench.harness", Harness(*records))
    result = djinn("baseline", "all")
    assert result.exit_code == 1
    assert "deepspeed:cpu: oom: out of memory: 26 GB of weights, 12 GB of RAM" in result.stdout
    assert "TTFT" in result.stdout
    assert "90.8%" in result.stdout
    assert "TTFT" not in djinn("baseline", "all", "--ttft-disabled").stdout


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()

    def interrupted(profile: Profile, run_dir: Path) -> list[Record]:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run_baselines", interrupted)
    monkeypatch.setitem(sys.modules, "djinn.bench.harness", harness)
    assert djinn("baseline", "djinn").exit_code == 130


@pytest.mark.slow
def test_figures_and_report_of_a_run(fabricated_run: Path) -> None:
    drawn = djinn("figures", str(fabricated_run))
    assert drawn.exit_code == 0, drawn.output
    assert list((fabricated_run / "figures").glob("*.pdf"))
    written = djinn("report", str(fabricated_run))
    claims = json.loads((fabricated_run / "results/claims.json").read_text())
    assert written.exit_code == int(any(claim["verdict"] == "FAIL" for claim in claims))
    assert str(fabricated_run / "index.html") in written.stdout.replace("\n", "")
    assert "claims that apply here pass; 12 need a GPU" in written.stdout


def test_figures_of_a_run_that_is_not_there_are_refused(tmp_path: Path) -> None:
    drawn = djinn("figures", str(tmp_path / "none"))
    assert drawn.exit_code == 2
    assert "there is no such run directory" in drawn.output.replace("\n", " ")


def test_a_report_evaluates_the_claims_once(fabricated_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from djinn.artifact import claims, report

    written: list[Path] = []

    def counted(run_dir: Path) -> list[claims.Outcome]:
        written.append(run_dir)
        return write(run_dir)

    write = claims.write_claims
    for module in (claims, report):
        monkeypatch.setattr(module, "write_claims", counted)
    assert djinn("report", str(fabricated_run)).exit_code in (0, 1)
    assert written == [fabricated_run]


def test_a_report_shows_what_the_reference_run_of_the_profile_measured(fabricated_run: Path) -> None:
    from djinn.artifact.reference import measured, run_of

    reference = run_of("smoke_13b")
    assert reference is not None
    shown = djinn("report", str(fabricated_run)).stdout
    assert f"reference: {reference.name}, a run of the same profile" in shown
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("C9 ")]
    assert row[-1] == measured(reference)["C9"]
    (fabricated_run / "replayed.json").write_text('{"machine": "another", "date": "then"}')
    assert "reference" not in djinn("report", str(fabricated_run)).stdout


def test_report_of_something_else_is_bad_input(tmp_path: Path) -> None:
    result = djinn("report", str(tmp_path))
    assert result.exit_code == 2
    assert "is not a run directory" in result.stderr


def test_a_run_directory_of_another_configuration_is_bad_input(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "djinn.bench.harness", Harness(records[0]))
    assert djinn("baseline", "all").exit_code == 0
    result = djinn("baseline", "all", "--runs", "9")
    assert result.exit_code == 2
    assert "runs: 3 there, 9 asked for" in result.stderr


def test_a_run_directory_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    result = djinn("certify", "--output-dir", str(in_the_way))
    assert result.exit_code == 2
    assert str(in_the_way) in result.stderr
