"""The TensorFlow operators that an untrusted SavedModel may hold: mathematics on its inputs and variables."""

#: Operators that compute their outputs from their inputs alone, and those that read a variable.
MATHEMATICS = frozenset(
    """
    Abs Add AddN AddV2 All Any ArgMax ArgMin Assert BatchMatMul BatchMatMulV2 BatchMatMulV3 BiasAdd BroadcastArgs
    BroadcastTo Cast Ceil ClipByValue Concat ConcatV2 Const Cos Cumprod Cumsum DisableCopyOnRead Div DivNoNan Einsum
    Elu EnsureShape Equal Erf Erfc Exp ExpandDims Expm1 Fill Floor FloorDiv FloorMod Gather GatherNd GatherV2
    Greater GreaterEqual Identity IdentityN InvertPermutation IsFinite IsInf IsNan LeakyRelu Less LessEqual LinSpace
    Log Log1p LogSoftmax LogicalAnd LogicalNot LogicalOr MatMul MatrixBandPart Max Maximum Mean Min Minimum Mod Mul
    MulNoNan Neg NoOp NotEqual OneHot OnesLike Pack Pad PadV2 Placeholder PlaceholderWithDefault Pow PreventGradient
    Prod Range Rank ReadVariableOp RealDiv Reciprocal Relu Relu6 Reshape ResourceGather ReverseV2 Rint Round Rsqrt
    ScatterNd Select SelectV2 Selu Shape ShapeN Sigmoid Sign Sin Size Slice Snapshot Softmax Softplus Softsign Split
    SplitV Sqrt Square SquaredDifference Squeeze StatelessRandomGetAlg StatelessRandomGetKeyCounter
    StatelessRandomGetKeyCounterAlg StatelessRandomUniform StatelessRandomUniformInt StatelessRandomUniformV2
    StopGradient StridedSlice Sub Sum Tan Tanh TensorScatterUpdate Tile TopK TopKV2 Transpose TruncateDiv Unpack
    VarHandleOp VarIsInitializedOp Where Xdivy Xlogy ZerosLike
    """.split()
)
#: Operators that call functions. The runs of a ``While`` are limited by time.
CALLS = frozenset(
    "Case If PartitionedCall StatefulPartitionedCall StatelessCase StatelessIf StatelessWhile While".split()
)
#: Operators that read and write checkpoints: allowed in functions that only a main graph calls, which is never run.
CHECKPOINTS = frozenset(
    "AssignVariableOp MergeV2Checkpoints RestoreV2 SaveV2 ShardedFilename StaticRegexFullMatch StringJoin".split()
)
ALLOWED = MATHEMATICS | CALLS
