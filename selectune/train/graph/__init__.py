"""How every use of a weight in scope is seen, and the nodes of the autograd graph that it becomes.

weights    `Weight`, the parameter that reports its uses
sparse     torch's functions of a weight whose gradient can be formed at its support only
nodes      the nodes between the weights and the one trainable vector
taps       what is kept of one graph, and where a forward pass begins and ends
functions  calls that ask no __torch_function__: others' autograd functions, TorchScript, torch.func
recompute  inputs that are made again instead of saved
own_hooks  hooks of a tuner that a copied module does not take along
copies     where the vector stands on a model, and how a copy of the model becomes an ordinary one
"""
