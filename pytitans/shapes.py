"""The legend: one letter per axis, the same in annotations (`"B T H K"`) and suffixes (`q_BHTK`).

    B  batch                              K  width of a query or key, per memory head
    T  tokens of a call                   V  width of a value, per memory head
    H  heads, each with its own memory    C  tokens of a chunk: one gradient point
    L  layers of the memory's MLP         N  chunks of a call
    D  hidden size of the model           P  persistent tokens
    W  tokens of an attention window or segment

Tensors, never axes: M memory, S surprise, u momentary surprise.
"""
