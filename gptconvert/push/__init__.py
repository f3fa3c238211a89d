"""Upload an output directory to a repository of the Hugging Face hub: checked before, and compared after.

:mod:`.package` checks the directory, :mod:`.card` completes the model card, and :mod:`.plan` divides the files into
commits; none of these uses the network. :mod:`.upload` is the sequence of requests, :mod:`.hub` makes them, and
:mod:`.hub_errors` words what goes wrong. The local directory is never changed.
"""
