import pytest
import yaml
from pydantic import ValidationError

from djinn.artifact import reference
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.places import ROOT
from djinn.profiles import CONFIG_DIR, Profile, load_profile, profile_names, system_names

# Of a run on an H200 the digest had changed before: its records are older than fields that are in every dump.
RECORDED = [folder for folder in reference.runs() if folder.name != "h200_2026-11-24"]


def write(tmp_path, **changes):
    document = yaml.safe_load((CONFIG_DIR / "smoke_tiny.yaml").read_text()) | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_load_and_survive_json(name):
    profile = load_profile(name)
    assert profile.name == name
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


def test_the_l4_profile_is_the_papers():
    profile = load_profile("virt_mem_l4")
    assert (profile.budget, profile.ring) == (24 * 10**9, 20 * 10**9)
    assert profile.sweep.chunks == tuple(size * 2**20 for size in (16, 64, 128, 512))
    assert profile.sweep.runs == 3


def test_an_unknown_profile_lists_those_there_are():
    with pytest.raises(ConfigError, match="smoke_tiny") as caught:
        load_profile("smoke_tny")
    assert all(name in str(caught.value) for name in profile_names())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bugdet": "5 MB"}, ["bugdet", "did you mean budget"]),
        ({"sweep": {"chunk": ["1 MiB"]}}, ["sweep.chunk", "did you mean chunks"]),
        ({"budget": "-5 MB"}, ["budget", "-5 MB"]),
        ({"budget": 5000000}, ["budget", "no unit"]),
        ({"budget": "5 mb"}, ["budget", "5 mb"]),
        ({"ring": "6 MB"}, ["ring 6 MB", "the budget 5 MB"]),
        ({"ring": "4 MB", "sweep": {"budgets": ["8 MB", "3 MB"]}}, ["ring 4 MB", "the sweep's budget 3 MB"]),
        ({"sweep": {"budgets": ["3 MB", "0 MB"]}}, ["sweep.budgets.1", "not positive"]),
        ({"runs": 0}, ["runs"]),
        ({"systems": ["djin"]}, ["djin", "accelerate:disk"]),
        ({"systems": []}, ["systems"]),
        ({"dtype": "int3"}, ["dtype", "bfloat16"]),
        ({"device": "tpu"}, ["device", "cuda"]),
        ({"gpus": 0}, ["gpus", "greater than or equal to 1"]),
        ({"disable_kv_swap": False}, ["disable_kv_swap", "cuda"]),
        ({"weights": "memory"}, ["weights: memory", "cuda"]),
        ({"weights": "memory", "model": "somewhere"}, ["weights: memory", "synthetic"]),
    ],
)
def test_impossible_values_are_refused_by_name(tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        load_profile(write(tmp_path, **changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_files_that_are_not_profiles(tmp_path):
    for text in (b"- a list", b"a: [", b"", b"a: \xff", b"[" * 99999):
        path = tmp_path / "bad.yaml"
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=r"bad\.yaml"):
            load_profile(path)


def test_override_validates_and_changes_the_digest():
    profile = load_profile("smoke_tiny")
    changed = profile.override(chunk="1 MiB", runs=1)
    assert (changed.chunk, changed.runs, changed.budget) == (2**20, 1, profile.budget)
    assert changed.digest != profile.digest
    assert profile.override().digest == profile.digest
    with pytest.raises(ConfigError, match="did you mean runs"):
        profile.override(rusn=1)
    with pytest.raises(ConfigError, match="ring"):
        profile.override(ring="1 GB")


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_the_digest_of_a_recorded_profile_is_that_of_its_records(folder):
    run = Run(folder)
    assert {record.config_digest for record in run.baselines} == {run.profile.digest}


def test_only_profiles_that_sweep_budgets_say_so_in_what_is_digested():
    swept = {name for name in profile_names() if "budgets" in load_profile(name).model_dump_json()}
    assert swept == {"smoke_moe", "moe_h100"}
    assert load_profile("smoke_tiny").digest == "8f82c16c18b0c909"


def test_one_gpu_says_nothing_in_what_is_digested():
    several = {name for name in profile_names() if "gpus" in load_profile(name).model_dump_json()}
    assert several == {"smoke_ranks", "ranks_2x24", "virt_mem_4x24", "huge_4x80"}
    profile = load_profile("smoke_tiny")
    assert profile.override(gpus=1).digest == profile.digest
    assert profile.override(gpus=2).digest != profile.digest
    assert load_profile("smoke_ranks").override(gpus=1).gpus == 1


def test_what_few_profiles_say_is_not_digested_in_the_others():
    """So records of older profiles keep their digests."""
    plain = load_profile("smoke_tiny")
    for name, value in {
        "brief": {"systems": ["djinn"], "runs": 1, "new_tokens": 2},
        "deepspeed": {"stage3_max_live_parameters": 10},
        "sweep": plain.sweep.model_dump(mode="json") | {"batches": [1, 4]},
    }.items():
        assert plain.override(**{name: value}).digest != plain.digest
    assert not {"brief", "deepspeed"} & plain.model_dump().keys()
    assert not {"batches", "prompts", "systems"} & plain.model_dump()["sweep"].keys()


def test_slow_systems_may_run_fewer_times_and_shorter():
    profile = load_profile("compare_70b")
    shipped = profile.of("accelerate:cpu")
    assert (shipped.runs, shipped.new_tokens) == (2, 3)
    assert profile.of("deepspeed:cpu") is profile.of("djinn") is profile
    assert (profile.runs, profile.new_tokens) == (5, 16)
    assert profile.of("djinn:lossless").coding == "lossless"
    with pytest.raises(ConfigError, match="brief: resident is none of the profile's systems"):
        profile.override(brief={"systems": ["resident"], "runs": 1, "new_tokens": 1})


@pytest.mark.parametrize("part", ["sweep", "brief", "deepspeed"])
def test_an_unknown_key_of_a_part_is_named_with_its_own_keys(part):
    with pytest.raises(ConfigError, match=rf"unknown key {part}\.rnus; "):
        load_profile("compare_70b").override(**{part: {"rnus": 1}})


def test_a_system_says_how_many_processes_hold_it():
    profile = load_profile("ranks_2x24")
    assert [profile.processes(system) for system in ("djinn", "deepspeed", "resident", "accelerate")] == [2, 2, 2, 1]


def test_a_run_of_one_gpu_is_not_continued_on_two(tmp_path):
    profile = load_profile("smoke_tiny")
    Run.open(tmp_path, profile)
    with pytest.raises(ConfigError, match=r"gpus: not set there, 2 asked for"):
        Run.open(tmp_path, profile.override(gpus=2))


def test_profiles_do_not_change():
    with pytest.raises(ValidationError):
        load_profile("smoke_tiny").runs = 5


def test_system_names_are_those_that_profiles_accept():
    names = system_names()
    assert {"djinn", "accelerate:disk", "deepspeed:nvme", "resident"} <= set(names)
    assert load_profile("smoke_tiny").override(systems=names).systems == tuple(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../../x"}, "name: name '../../x'"),
        ({"name": ""}, "name: name ''"),
        ({"name": "/abs"}, "name: name '/abs'"),
        ({"chunk": "1000000000 GB"}, "chunk: the size is more than 1000 TB"),
        ({"budget": "9" * 500 + " GB"}, "budget: the size is more than 1000 TB"),
        ({"seed": -1}, "seed: "),
        ({"seed": 10**30}, "seed: "),
        ({"minutes": float("inf")}, "minutes: "),
        ({"runs": 10**12}, "runs: "),
        ({"device": ""}, "device: "),
        ({"device": "cpu:5"}, "device: "),
        ({"model": ""}, "model: '' is no model"),
        ({"model": "a\0b"}, "is no model"),
    ],
)
def test_a_profile_that_means_nothing_is_refused_by_key(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        load_profile(write(tmp_path, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [b"title: \xff\xfe", b"title: " + b"[" * 20_000, b"title: 2020-13-45"])
def test_a_profile_that_cannot_be_read_is_refused_by_name(tmp_path, data):
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"mine\.yaml: not"):
        load_profile(path)


def test_a_profile_is_looked_up_by_its_name_alone():
    for name in ("../configs/smoke_tiny", "./smoke_tiny", "", "/"):
        with pytest.raises(ConfigError, match="no profile"):
            load_profile(name)


def test_the_template_is_a_profile_of_its_own():
    template = load_profile(ROOT / "artifact" / "template.yaml")
    assert template.name not in profile_names()
    assert template.sweep.batches
    assert template.sweep.prompts
