"""MXNet 2."""

import mxnet
from golden.mxnet_steps import mxnet_signature, starter
from golden.recording import main

if __name__ == '__main__':
    main(
        {'mxnet': starter(mxnet), 'mxnet_unfused': starter(mxnet, use_fused_step=False)},
        {'mxnet': mxnet_signature(mxnet)},
        ('mxnet', 'numpy'),
    )
