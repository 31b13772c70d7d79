"""python -m verl_recipes.run.merge_lora MODEL: the adapter in MODEL/lora_adapter becomes part of the weights in MODEL.

verl's merger writes a LoRA checkpoint as the base model with an adapter beside it. A program that loads the folder
would get the base model alone.
"""

import shutil
import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM


def merge(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    PeftModel.from_pretrained(model, folder / "lora_adapter").merge_and_unload().save_pretrained(folder)
    shutil.rmtree(folder / "lora_adapter")


if __name__ == "__main__":
    merge(Path(sys.argv[1]))
