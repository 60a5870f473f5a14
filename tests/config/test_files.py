"""Files that name files: `base:` of a whole file, `base:` and `run:` of a node, and how one is laid over another."""

from pathlib import Path

import pytest
import yaml

from ldm import compat
from ldm.config import ConfigError, load, read, trust_base
from ldm.config.files import read_with_bases
from ldm.config.merge import merge
from ldm.config.overrides import apply_overrides, parse_override, split_overrides

OURS = "ldm.models.autoencoder.Autoencoder"


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def node(target: str = "torch.nn.Identity", **params: object) -> dict:
    return {"target": target, "params": params}


def model(**params: object) -> dict:
    return {"model": node(**params)}


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------- base of a file


def test_a_file_is_laid_over_its_bases_left_to_right_and_these_over_theirs(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a.yaml", model(a=1, b=1, c=1, d=1))
    write(tmp_path / "b.yaml", {"base": "deep/a.yaml", **model(b=2, c=2, d=2)})
    write(tmp_path / "c.yaml", model(c=3, d=3))
    path = write(tmp_path / "own" / "d.yaml", {"base": ["../b.yaml", str(tmp_path / "c.yaml")], **model(d=4)})
    assert read(path) == model(a=1, b=2, c=3, d=4)
    assert "base" not in load(path)


def test_a_file_of_several_on_the_command_line_may_have_a_base(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", model(a=1, b=1))
    first, second = write(tmp_path / "x.yaml", model(a=0, c=0)), write(tmp_path / "y.yaml", {"base": "base.yaml"})
    assert read([first, second]) == model(a=1, b=1, c=0)


def test_a_circle_of_bases_names_the_chain(tmp_path: Path) -> None:
    a = write(tmp_path / "a.yaml", {"base": "b.yaml"})
    write(tmp_path / "b.yaml", {"base": "sub/c.yaml"})
    c = write(tmp_path / "sub" / "c.yaml", {"base": ["../a.yaml"]})
    assert problem(a) == f"{c}: base: leads in a circle: a.yaml -> b.yaml -> sub/c.yaml -> a.yaml"
    itself = write(tmp_path / "d.yaml", {"base": "d.yaml"})
    assert problem(itself) == f"{itself}: base: leads in a circle: d.yaml -> d.yaml"


def test_an_absent_base_is_named_with_the_nearest_and_the_chain(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.yaml", {"base": "b.yaml"}), write(tmp_path / "b.yaml", {"base": "ffqh.yaml"})
    write(tmp_path / "ffhq.yaml", {})
    assert problem(a) == f"{b}: base: no such file; did you mean ffhq.yaml? (a.yaml -> b.yaml -> ffqh.yaml)"


@pytest.mark.parametrize("base", [3, {"a": "b.yaml"}, [["b.yaml"]], ""])
def test_a_base_that_is_no_path(tmp_path: Path, base: object) -> None:
    path = write(tmp_path / "a.yaml", {"base": base})
    if base == "":
        assert read(path) == {}
    else:
        assert problem(path).startswith(f"{path}: base: ")


@pytest.mark.parametrize("holder", ["below.yaml", "above.yaml", "top.yaml"])
def test_the_file_of_a_chain_that_holds_the_mistake_is_named(tmp_path: Path, holder: str) -> None:
    part = {"target": "torch.nn.Flatten", "params": {"start_dim": 1}}
    contents = {
        "below.yaml": {"model": node("torch.nn.Sequential", part=part)},
        "above.yaml": {"base": "below.yaml", "data": node()},
        "top.yaml": {"base": "above.yaml"},
    }
    contents[holder] = merge(contents[holder], {"model": {"params": {"part": {"params": {"x": 1}}, "checkpiont": 1}}})
    contents[holder]["model"]["checkpiont"] = "x"
    for name, content in contents.items():
        write(tmp_path / name, content)
    says = problem(tmp_path / "top.yaml")
    assert says == f"{tmp_path / holder}: model.checkpiont: unknown; did you mean checkpoint?"


# -------------------------------------------------------------------------------------------------- one over another


def test_a_node_with_another_target_inherits_no_params() -> None:
    below = {"process": node("a.Linear", start=0.1, end=0.2) | {"checkpoint": "c", "ignore_keys": ["k"]}, "other": 1}
    above = {"process": node("a.Cosine", s=0.1)}
    assert merge(below, above) == {"process": node("a.Cosine", s=0.1), "other": 1}
    assert merge(below, {"process": {"target": "a.Cosine"}})["process"] == {"target": "a.Cosine"}


def test_a_node_with_the_same_target_or_none_keeps_its_params() -> None:
    below = {"process": node("a.Linear", start=0.1, end=0.2), "learning_rate": 1}
    assert merge(below, {"process": node("a.Linear", end=0.3)})["process"] == node("a.Linear", start=0.1, end=0.3)
    assert merge(below, {"process": {"params": {"end": 0.3}}})["process"] == node("a.Linear", start=0.1, end=0.3)


def test_null_takes_a_node_away_and_lists_are_replaced() -> None:
    below = {"conditioner": node(a=1), "parts": [1, 2, 3]}
    assert merge(below, {"conditioner": None, "parts": [4]}) == {"conditioner": None, "parts": [4]}


def test_what_a_training_says_outside_of_its_node_outlives_another_target() -> None:
    below = {"model": node("a.A", x=1) | {"learning_rate": 0.1}}
    assert merge(below, {"model": node("a.B", y=1)}) == {"model": node("a.B", y=1) | {"learning_rate": 0.1}}


# --------------------------------------------------------------------------------------------- nodes that name files


def first_stage(folder: Path, **params: object) -> Path:
    inner = node("torch.nn.Flatten", **{"start_dim": 1, **params}) | {"checkpoint": "old.ckpt"}
    return write(
        folder / "stages" / "vq.yaml", {"model": node("torch.nn.Sequential", autoencoder=inner), "data": node()}
    )


def test_a_node_takes_itself_from_another_file(tmp_path: Path) -> None:
    first_stage(tmp_path, end_dim=2)
    reference = {"base": "../stages/vq.yaml", "checkpoint": "new.ckpt", "params": {"end_dim": 3}}
    path = write(tmp_path / "ldm" / "a.yaml", model(autoencoder=reference, depth=1))
    expanded = node("torch.nn.Flatten", start_dim=1, end_dim=3) | {"checkpoint": "new.ckpt"}
    assert read(path) == model(autoencoder=expanded, depth=1)
    assert load(path).model.params.autoencoder == expanded


def test_a_variant_names_another_file_and_inherits_nothing_of_the_first(tmp_path: Path) -> None:
    first_stage(tmp_path, end_dim=2)
    other = {"model": {"params": {"autoencoder": node("torch.nn.Flatten", start_dim=0)}}}
    write(tmp_path / "stages" / "kl.yaml", other)
    write(tmp_path / "a.yaml", model(autoencoder={"base": "stages/vq.yaml", "checkpoint": "c"}))
    path = write(tmp_path / "b.yaml", {"base": "a.yaml", **model(autoencoder={"base": "stages/kl.yaml"})})
    assert read(path) == model(autoencoder=node("torch.nn.Flatten", start_dim=0))
    path = write(tmp_path / "c.yaml", {"base": "a.yaml", **model(autoencoder=node("torch.nn.Identity"))})
    assert read(path) == model(autoencoder=node("torch.nn.Identity"))
    path = write(tmp_path / "d.yaml", {"base": "a.yaml", **model(autoencoder={"checkpoint": "d"})})
    assert read(path)["model"]["params"]["autoencoder"]["checkpoint"] == "d"


def test_a_node_is_named_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first_stage(tmp_path)
    path = write(tmp_path / "far" / "a.yaml", model(autoencoder=node(a=1)))
    given = ["model.params.autoencoder.base=stages/vq.yaml", "model.params.autoencoder.params.end_dim=5"]
    got = read(path, given)["model"]["params"]["autoencoder"]
    assert got == node("torch.nn.Flatten", start_dim=1, end_dim=5) | {"checkpoint": "old.ckpt"}
    assert read(path, ["model.params.autoencoder={base: stages/vq.yaml, checkpoint: null}"]) == model(
        autoencoder=node("torch.nn.Flatten", start_dim=1) | {"checkpoint": None}
    )


def test_a_mistake_behind_a_reference_is_laid_to_its_file(tmp_path: Path) -> None:
    stage = first_stage(tmp_path, end=3)
    path = write(tmp_path / "a.yaml", model(autoencoder={"base": "stages/vq.yaml", "params": {"start_dim": 2}}))
    assert problem(path).startswith(f"{stage}: model.params.autoencoder.params.end: unknown; did you mean end_dim?")


def test_references_that_lead_nowhere(tmp_path: Path) -> None:
    stage = first_stage(tmp_path)
    place = "model.params.autoencoder"
    path = write(tmp_path / "a.yaml", model(autoencoder={"base": "stages/vp.yaml"}))
    assert problem(path) == f"{path}: {place}.base: no such file; did you mean vq.yaml? (a.yaml -> stages/vp.yaml)"
    path = write(tmp_path / "b.yaml", model(network={"base": "stages/vq.yaml"}))
    assert problem(path) == f"{path}: model.params.network.base: {stage} has no model.params.network"
    path = write(tmp_path / "c.yaml", model(autoencoder={"base": "c.yaml"}))
    assert problem(path) == f"{path}: {place}.base: leads in a circle: c.yaml -> c.yaml"
    path = write(tmp_path / "d.yaml", model(autoencoder={"base": "stages/vq.yaml", "run": "logs"}))
    assert problem(path) == f"{path}: {place}: names its config twice; leave out base or run"
    path = write(tmp_path / "e.yaml", model(autoencoder={"run": str(tmp_path / "nothing")}))
    assert problem(path).startswith(f"{path}: {place}.run: {tmp_path / 'nothing'} has no config; expected configs/")


def test_a_run_brings_its_config_and_its_weights(tmp_path: Path) -> None:
    inner = node("torch.nn.Flatten", start_dim=1) | {"checkpoint": "where/it/began.ckpt", "ignore_keys": ["a"]}
    run = tmp_path / "logs" / "run"
    write(run / "configs" / "config.yaml", {"model": node(autoencoder=inner)})
    expanded = node("torch.nn.Flatten", start_dim=1) | {"checkpoint": str(run)}
    path = write(tmp_path / "a.yaml", model(autoencoder={"run": str(run)}))
    assert read(path) == model(autoencoder=expanded)
    file = run / "checkpoints" / "last.ckpt"
    assert read(path, [f"model.params.autoencoder.run={file}"]) == model(
        autoencoder=expanded | {"checkpoint": str(file)}
    )


def test_a_published_first_stage_brings_its_config(tmp_path: Path) -> None:
    ddconfig = {"double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32}
    ddconfig |= {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    theirs = node(
        "ldm.models.autoencoder.AutoencoderKL", ddconfig=ddconfig, embed_dim=4, lossconfig=node("torch.nn.Identity")
    )
    folder = tmp_path / "kl-f2"
    write(folder / "config.yaml", {"model": theirs})
    path = write(tmp_path / "a.yaml", model(autoencoder={"run": str(folder)}))
    got = compat.load(path).model.params.autoencoder
    assert (got.target, got.checkpoint, got.params.embed_dim) == (OURS, str(folder), 4)
    again = compat.load(write(tmp_path / "again.yaml", yaml.safe_dump(compat.read(path))))
    assert again.model.params.autoencoder == got


@pytest.mark.parametrize("form", ["base", "nodes"])
def test_files_that_name_each_other_twice_are_refused_before_their_number_explodes(tmp_path: Path, form: str) -> None:
    (tmp_path / "0.yaml").write_text("model: {target: a.B, params: {x: {target: a.B}, y: {target: a.B}}}\n")
    for i in range(1, 30):
        node = f"{{base: {i - 1}.yaml}}"
        nodes = f"model: {{target: a.B, params: {{x: {node}, y: {node}}}}}"
        (tmp_path / f"{i}.yaml").write_text(nodes if form == "nodes" else f"base: [{i - 1}.yaml, {i - 1}.yaml]\n")
    with pytest.raises(ConfigError, match="more than 200 files"):
        trust_base([tmp_path / "29.yaml"])
        compat.load(tmp_path / "29.yaml", check=False)


# ---------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_told_from_other_words_by_their_form() -> None:
    words = ["--name", "a=b", "model.params.x=1", "-t", "data.parts[0].y=a=b", "logs/a.b=c", "x.y"]
    assert split_overrides(words) == (
        ["model.params.x=1", "data.parts[0].y=a=b"],
        ["--name", "a=b", "-t", "logs/a.b=c", "x.y"],
    )


def test_what_follows_a_flag_with_a_value_is_no_override() -> None:
    words = ["--prompt", "a.b=1", "c.d=2", "--pro", "e.f=3", "-t", "g.h=4", "--", "i.j=5", "--prompt=k.l=6"]
    overrides, rest = split_overrides(words, ["--prompt", "-p"])
    assert overrides == ["c.d=2", "g.h=4", "i.j=5"]
    assert rest == ["--prompt", "a.b=1", "--pro", "e.f=3", "-t", "--", "--prompt=k.l=6"]


def test_overrides_set_one_value_each() -> None:
    config = model(part=node("a.A", x=1), parts=[{"a": 1}, 2])
    given = ["model.params.part.target=a.B", "model.params.parts[0].a=3", "model.params.parts.1=[5]", "model.new.key=x"]
    want = model(part=node("a.B", x=1), parts=[{"a": 3}, [5]])
    assert apply_overrides(config, given) == {"model": want["model"] | {"new": {"key": "x"}}}
    assert config == model(part=node("a.A", x=1), parts=[{"a": 1}, 2])
    assert apply_overrides(config, ["model.params.part={target: a.B}"])["model"]["params"]["part"] == {"target": "a.B"}


@pytest.mark.parametrize(
    "override", ["model.params.parts.2=1", "model.params.parts.x=1", "model.params.part.params.x.y=1"]
)
def test_an_override_of_what_cannot_be_set(override: str) -> None:
    with pytest.raises(ConfigError, match="cannot be set") as caught:
        apply_overrides(model(part=node("a.A", x=1), parts=[{"a": 1}, 2]), [override])
    assert caught.value.path == override.partition("=")[0]


@pytest.mark.parametrize("value", ["/data/set #2", "a  #b", "1 # one"])
def test_a_comment_in_an_override_is_refused_rather_than_left_out(value: str) -> None:
    with pytest.raises(ConfigError, match="data.params.root: from # on it is a comment.*quote"):
        parse_override(f"data.params.root={value}")
    assert parse_override(f'data.params.root="{value}"')[1] == value
    assert parse_override("data.params.root=a#b")[1] == "a#b"


TAGS = ("!!bool x", "!!set {a}", "!!int x", "!!float []", "!!binary '#'", "!!timestamp x", "!!omap 3")


@pytest.mark.parametrize("value", TAGS)
def test_a_value_under_a_wrong_tag_is_one_line(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        parse_override(f"a.b={value}")
    (tmp_path / "a.yaml").write_text(f"model: {value}\n")
    with pytest.raises(ConfigError, match="a.yaml"):
        read_with_bases(tmp_path / "a.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_may_begin_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("model: {größe: 3}\r\n".encode(encoding))
    assert read_with_bases(tmp_path / "a.yaml").content == {"model": {"größe": 3}}
