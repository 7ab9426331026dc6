"""Other libraries' losses with this package's kernels. A library is imported only by the module that adapts it.

Each class has the name, constructor and call of the library's own and gives its value and gradients; ``backend`` and
``memory_budget`` are attributes (see ``contrastive_stats``). What is not covered raises NotImplementedError.
"""
