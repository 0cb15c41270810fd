"""The file of a delta: bytes in, checked parts out (docs/delta-format.md).

format          the only reader and the only writer
schema          strict JSON, names, and the closed schema of `info`
container       the outer safetensors container
codec           increasing indices as 16-bit gaps
parts           patches (scattered scalars of a tensor) and dense tensors
fingerprint     digests of a model: its structure, and the bits of its tensors
model_info      what a delta records of its base: origin, class, labels, fresh parameters
adapter_record  how the adapter under a delta is made again
"""
