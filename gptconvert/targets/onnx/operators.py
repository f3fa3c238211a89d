"""The ONNX operators that an untrusted graph may hold: mathematics on its inputs and weights.

Left out: Loop, Scan and SequenceMap, whose runs nothing bounds; random numbers; strings, images and training; and
everything of other domains, which custom libraries would provide.
"""

#: Operators of ai.onnx, those of onnxruntime's optimiser in that domain among them.
ONNX = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention BatchNormalization BitCast BitShift
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike CausalConvWithState Ceil Celu Clip Compress Concat
    ConcatFromSequence Constant ConstantOfShape Conv ConvInteger Cos Cosh CumProd CumSum DequantizeLinear Div
    Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements
    GatherND Gelu Gemm Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax Identity If
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual LinearAttention Log LogSoftmax
    LpNormalization MatMul MatMulInteger Max Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonZero Not OneHot
    Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    ReverseSequence RotaryEmbedding Round Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct
    SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape Shrink Sigmoid Sign SimplifiedLayerNormalization
    Sin Sinh Size Slice Softmax Softplus Softsign Split SplitToSequence Sqrt Squeeze Sub Sum SwiGLU Swish Tan Tanh
    TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Where Xor
    """.split()
)
#: Operators of com.microsoft that onnxruntime's optimisers and quantisers write. Its search loops are left out.
MICROSOFT = frozenset(
    """
    Attention BiasAdd BiasGelu BiasSoftmax BiasSplitGelu DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention
    DequantizeLinear DynamicQuantizeMatMul EmbedLayerNormalization ExpandDims FastGelu FusedGemm FusedMatMul
    FusedMatMulActivation GatherBlockQuantized GatherND Gelu GemmFastGelu GroupQueryAttention LayerNormalization
    LongformerAttention MatMulBnb4 MatMulInteger16 MatMulIntegerToFloat MatMulNBits MultiHeadAttention
    PackedAttention PackedMultiHeadAttention PagedAttention QAttention QEmbedLayerNormalization QGemm QLinearAdd
    QLinearConcat QLinearMul QLinearSigmoid QLinearSoftmax QLinearWhere QMoE QOrderedMatMul QuantizeLinear QuickGelu
    RemovePadding RestorePadding RotaryEmbedding SimplifiedLayerNormalization SkipLayerNormalization
    SkipSimplifiedLayerNormalization SparseAttention TransposeMatMul Trilu Unique
    """.split()
)
#: Domain → operators; the standard domain has two names.
ALLOWED = {"": ONNX, "ai.onnx": ONNX, "com.microsoft": MICROSOFT}
