"""Out to other people's tools, and in from them.

bridges    the doors: `export` writes a delta in another tool's form, `import_delta` reads one from it
merged     a plain model folder, and one with a recipe for mergekit
to_peft    an adapter that stock peft loads
from_peft  a delta from peft's SHiRA, Super-Tuning and trainable tokens
patches    changed scalars in the shape of vLLM's sparse weight transfer
pairs      changed scalars as pairs of tensors in a safetensors file
toolkit    a delta from a summary of the authors' toolkit, read without unpickling
sync       a stream of patches from a run to servers, step by step
peft       importing it teaches peft our method: `SelectuneConfig`
"""

from selectune.interop import sync

__all__ = ["sync"]
