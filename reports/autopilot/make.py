"""Writes a small real job whose responses become three times as long half-way: a model that counts
down from the number that is its prompt, and prompts whose numbers are larger in the second half.

python make.py DIRECTORY [STEPS]
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from executor.data.order import Shuffled

SHORT, LONG = 32, 96  # response tokens, with the end of the sequence
BATCH, GROUP, SEED = 256, 4, 0
HIDDEN, LAYERS = 128, 2
PAD, EOS = 0, 1  # before the numbers
SHARPNESS = 60.0  # of the next token: it has all of the probability

WORKLOAD = """\
schema = "splitplan/workload/1"
name = "countdown"
batch = {batch}
minibatch = {half}
prompt = {{ kind = "fixed", tokens = 1 }}
response = {{ kind = "lognormal", mean = {short}, sigma = 0.05, max = {longest} }}
steps = {steps}
seed = {seed}
samples_per_prompt = {group}
max_staleness = 1

[actor]
path = "actor"

[reward]
function = "reward.py:length"

[data]
train = "train.jsonl"

[algorithm]
advantage = "grpo"
kl_coef = 0.0

[optimizer]
actor = {{ lr = 1e-9 }}
"""

REWARD = '''\
"""What a response is worth: nothing is to be learned here, so all are worth the same."""


def length(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    return [1.0 for _ in responses]
'''


def make(directory: Path, steps: int, short: int = SHORT) -> None:
    """Write the model, the prompts and the workload into a directory. The responses of the first
    half have `short` tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    model(LONG).save_pretrained(directory / "actor")
    tokenizer(LONG).save_pretrained(directory / "actor")
    lines = [json.dumps({"prompt": str(number - 1)}) for number in lengths(steps, short)]
    (directory / "train.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "reward.py").write_text(REWARD)
    sizes = {
        "batch": BATCH,
        "half": BATCH // 2,
        "group": GROUP,
        "short": SHORT,
        "longest": LONG + 2,
    }
    written = WORKLOAD.format(**sizes, steps=steps, seed=SEED)
    (directory / "workload.toml").write_text(written)


def lengths(steps: int, short: int) -> list[int]:
    """The length of the response to each row of the data. Rows come in an order that the seed
    fixes: those of the second half of the steps are the long ones."""
    rows = BATCH // GROUP * steps
    found = [0] * rows
    order = Shuffled([rows], [1.0], SEED)
    for turn, (_, row) in enumerate(order.places(0, rows)):
        found[row] = short if turn < rows // 2 else LONG
    return found


def model(most: int) -> LlamaForCausalLM:
    """A model whose layers compute and add nothing: so the next token follows from the last one,
    by the row of the head that is that one's embedding. After the number n comes n - 1, and after
    0 the end."""
    config = LlamaConfig(
        vocab_size=2 + most,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    found = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in found.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(torch.randn(2 + most, HIDDEN))
        found.model.embed_tokens.weight.copy_(embeddings)
        found.lm_head.weight.zero_()
        found.lm_head.weight[EOS:-1] = SHARPNESS / HIDDEN**0.5 * embeddings[EOS + 1 :]
    found.generation_config.eos_token_id = EOS
    return found


def tokenizer(most: int) -> PreTrainedTokenizerFast:
    """A tokenizer of numbers."""
    words = ["<pad>", "<eos>", *map(str, range(most))]
    made = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 80)
