"""P2: from autograd to one wire buffer per bucket, and back. A closed mechanism in parts; the engine is passed in.

hooks hears of finished gradients and says when a bucket is complete; buckets holds the gradients; reducer sends them.
"""
from pyfleet.gradients.buckets import Bucket, assign, make_buckets
from pyfleet.gradients.buffers import BufferBroadcast
from pyfleet.gradients.hooks import GradientHooks
from pyfleet.gradients.norms import gradient_norms
from pyfleet.gradients.reducer import Reducer

__all__ = ["Bucket", "BufferBroadcast", "GradientHooks", "Reducer", "assign", "gradient_norms", "make_buckets"]
