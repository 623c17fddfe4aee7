"""The block backend and the vocabulary of nodes. Imports nothing of nbdserve but `errors`."""
