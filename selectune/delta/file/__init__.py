"""The file of a delta: bytes in, checked parts out (docs/delta-format.md).

content         the value that is read and written: patches, dense tensors, info
format          the only reader and the only writer
schema          strict JSON, names, and the closed schema of `info`
container       the outer safetensors container
codec           increasing indices as 16-bit gaps
parts           patches (scattered scalars of a tensor) and dense tensors
fingerprint     digests of a model: its structure, and the bits of its tensors
model_info      the record of the base: origin, class, labels, fresh parameters
adapter_record  the record of an adapter on the base, from which it can be made again
"""
