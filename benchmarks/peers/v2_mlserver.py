"""The peer of benchmarks/v2_infer.py, in an environment with mlserver: its model `echo`, which returns its rows."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Echo(MLModel):
    """The rows, by the codec that MLServer's documentation recommends."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0])
        output = NumpyCodec.encode_output("y", x)
        return InferenceResponse(model_name=self.name, outputs=[output])
