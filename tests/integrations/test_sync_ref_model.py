"""TRL's SyncRefModelCallback mixes a policy into its reference by pairing their parameters in order."""

from __future__ import annotations

import copy

import pytest
import torch
from trainer_kit import causal

import selectune as st
from selectune.integrations.ref_model import pair_up
from selectune.integrations.transformers import SelectuneCallback
from selectune.models.bases import quiet

callbacks = pytest.importorskip("trl.trainer.callbacks", reason="TRL is not installed")


@pytest.mark.parametrize("before", [True, False], ids=["copied before attach", "loaded beside"])
def test_a_reference_is_mixed_with_the_tuned_weights(tmp_path, before):
    """The reference is the model without a tuner; a vector that it lacks must not shift or lengthen the pairs."""
    pytest.importorskip("datasets")
    model, _ = causal(tmp_path)
    reference = copy.deepcopy(model) if before else causal(tmp_path)[0]
    tuner = st.attach(model, st.random(budget=0.2))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0)
    tokens = torch.arange(4, 12)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    sync = callbacks.SyncRefModelCallback(reference, None)
    sync.sync_target_model = callbacks.SyncRefModelCallback._sync_target_model  # without asking for DeepSpeed
    pair_up([sync])
    pair_up([sync])  # as at every train()
    sync.sync_target_model(model, reference, 0.6)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(tensor, 0.4 * old[name] + 0.6 * tuned[name])
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in model.state_dict().items())
    tuner.verify()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_trls_preference_trainer_syncs_its_reference(tmp_path):
    """With a share of 1 the reference ends as the policy, at the selected entries and everywhere else."""
    datasets = pytest.importorskip("datasets")
    import trl

    model, tokenizer = causal(tmp_path)
    reference = causal(tmp_path)[0]
    tuner = st.attach(model, st.id3(budget=80, steps=3))
    rows = [{"prompt": "the dog", "chosen": " sees the cat .", "rejected": " eats a small fish ."}] * 8
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1,
        learning_rate=1e-2, max_length=32, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0,
    )  # fmt: skip
    with quiet():
        trainer = trl.DPOTrainer(
            model=model, ref_model=reference, args=args, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[SelectuneCallback(tuner)],
        )  # fmt: skip
        trainer.train()
    assert (tuner.step, tuner.selected) == (3, 80)
    assert tuner.verify().changed > 0
    policy = model.state_dict()
    assert all(torch.equal(tensor, policy[name]) for name, tensor in reference.state_dict().items())
