"""Every use of a weight in scope is seen, and becomes a node of the autograd graph.

weights    `Weight`, the parameter that reports its uses
sparse     replacements for torch's functions that form a weight's gradient at its support only
nodes      the nodes between the weights and the one trainable vector
taps       keeps the present graph, and learns where a forward pass begins and ends
functions  calls that bypass __torch_function__: foreign autograd functions, TorchScript, torch.func
recompute  inputs that are computed again instead of saved
own_hooks  a tuner's hooks, which stay behind when a module is copied
copies     where the vector is put on a model, and how a copy of the model becomes an ordinary one
"""
