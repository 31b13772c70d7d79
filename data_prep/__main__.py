"""python -m data_prep [overrides]: writes train.parquet and test.parquet in verl's format, and manifest.json.

One row of the result (https://verl.readthedocs.io/en/latest/preparation/prepare_data.html):

    data_source   "countdown"
    prompt        [{"role": "user", "content": "A conversation between User and Assistant. ..."}]
    ability       "math"
    reward_model  {"style": "rule", "ground_truth": {"numbers": [11, 18, 25], "target": 175}}
    extra_info    {"split": "train", "index": 0}

The folder appears whole or not at all: everything is written to a temporary folder beside it, which then takes its
name. Run again with the same configuration it does nothing.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hydra
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from data_prep.cli import CONFIGS, UserError, run
from data_prep.generate import Problem, generate


def to_row(problem: Problem, index: int, split: str, template: str) -> dict[str, Any]:
    """One problem in verl's schema. `template` holds {numbers}, printed as a Python list, and {target}."""
    return {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": template.format(**problem)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem},
        "extra_info": {"split": split, "index": index},
    }


def write(config: dict[str, Any], folder: Path) -> None:
    """Write both splits and the manifest into `folder`, which must exist."""
    shape = {key: config[key] for key in ("seed", "count", "max_number", "max_target", "held_out_share")}
    manifest: dict[str, Any] = {"configuration": config, "files": {}}
    for split in ("train", "test"):
        problems = generate(config[f"{split}_size"], test=split == "test", **shape)
        rows = [to_row(problem, i, split, config["prompt"]["template"]) for i, problem in enumerate(problems)]
        path = folder / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        manifest["files"][path.name] = {"rows": len(rows), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


@hydra.main(config_path=str(CONFIGS), config_name="prepare", version_base="1.3")
def main(cfg: DictConfig) -> None:
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    out = Path(config.pop("out"))
    manifest = out / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text())["configuration"] == config:
        print(f"{out}: already there, with this configuration")
        return
    if out.exists() and not manifest.exists():
        raise UserError(f"{out} exists and was not written by data_prep; name another folder with out=")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(config, temporary)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {config['train_size']} training and {config['test_size']} test problems")


if __name__ == "__main__":
    run(main)
