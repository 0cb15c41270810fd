"""TRL's GRPOTrainer with a tuner, and a server that gets the scalars that each step changed, bit for bit.

    python examples/grpo.py

It needs `pip install "selectune[hf,trl]"` and runs offline on the CPU. The server is a copy of the model here.
"""

import copy
import tempfile

import datasets
import tokenizers
import torch
import transformers
import trl

import selectune as st
from selectune.integrations.transformers import SelectuneCallback

WORDS = "<pad> <unk> <s> </s> the a dog cat bird fish sees eats finds big small red .".split()
lookup = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
lookup.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=lookup, padding_side="left", **special)
shape: dict = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(WORDS), **shape))
server, sent = st.sync.Replica(copy.deepcopy(model)), []


class Stream(transformers.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        sent.append(update := stream.update())
        server.apply(st.sync.WeightUpdate.from_bytes(update.to_bytes()))


def about_fish(completions, **kwargs):
    return [text.split().count("fish") / 8 for text in completions]


with tempfile.TemporaryDirectory() as folder:
    args = trl.GRPOConfig(folder, max_steps=3, num_generations=8, max_completion_length=8, learning_rate=3e-2,
                          save_strategy="no", report_to="none", use_cpu=True, bf16=False)  # fmt: skip
    tuner = st.attach(model, st.id3(budget=200, steps=3), accumulation_steps=args.gradient_accumulation_steps)
    stream, prompts = st.sync.PatchStream(tuner), datasets.Dataset.from_dict({"prompt": ["the dog", "a cat"] * 16})
    trl.GRPOTrainer(model=model, reward_funcs=about_fish, args=args, train_dataset=prompts, processing_class=tokenizer,
                    callbacks=[SelectuneCallback(tuner), Stream()]).train()  # fmt: skip
print(f"scalars sent: {[u.scalars for u in sent]} of {sum(p.numel() for p in server.model.parameters())}")
pairs = ((weight, model.get_parameter(name)) for name, weight in server.model.named_parameters())
print(f"the server has the trainer's bits: {all(torch.equal(a, b) for a, b in pairs)}")
