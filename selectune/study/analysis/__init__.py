"""What runs selected, when, and how far it moved: functions on deltas, run folders and base models.

supports    the entries that a run selected of the tensors in its scope, and the step of each
timing      when entries were selected, and how many gradients they were given
spread      tensor sparsity and three entropies of a selection, and their series over a run
allocation  a selection by layer and role, and the share of head and embeddings
magnitudes  how far entries moved: by tensor, below a dtype's resolution, against full fine-tuning
sharing     what several supports share, and what chance would give
theorem     Theorem 1 of ID3, on a model whose inputs and labels can be enumerated
subjects    what is analysed: a delta or a run's folder, with its record and the deltas on its way
findings    everything that can be said of one run, or of several
figures     the findings as figures, each with its numbers beside it
"""
