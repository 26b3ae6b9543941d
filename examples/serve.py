"""A server of masks: a picture is the body of a request, a PNG file with the class of every pixel the answer.

    pip install segzoo litserve
    python examples/serve.py --model edaformer_t.scenes --reduction fast
    curl -H 'Content-Type: image/jpeg' --data-binary @street.jpg http://127.0.0.1:8000/predict -o mask.png

Requests that come within 20 ms of each other go through the model together, up to eight. A body that is no picture is
answered with 422 and a sentence, {"detail": "..."}, whatever it came together with.
"""

import argparse
from typing import Annotated

import litserve
from fastapi import Body, Response
from fastapi.responses import JSONResponse

from segzoo.scale import BatchSegmenter


class Masks(litserve.LitAPI):
    def __init__(self, model: str, reduction: str | None):
        super().__init__(max_batch_size=8, batch_timeout=0.02)
        self.model, self.reduction = model, reduction

    def setup(self, device: str) -> None:
        options = {"device": device, "batch_size": self.max_batch_size}
        self.segment = BatchSegmenter(model=self.model, reduction=self.reduction, **options)
        self.segment({"bytes": []})  # builds the model before the first request

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/*")]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return list(inputs)

    def predict(self, pictures: list[bytes]) -> list[tuple[bytes, str]]:
        out = self.segment({"bytes": pictures})
        return list(zip(out["mask_png"], out["error"], strict=True))

    def unbatch(self, outputs: list[tuple[bytes, str]]) -> list[tuple[bytes, str]]:
        return outputs

    def encode_response(self, output: tuple[bytes, str]) -> Response:
        mask_png, error = output
        if error:  # an answer, and no exception, which would go to all that came together
            return JSONResponse({"detail": error.replace("<bytes>", "the body")}, status_code=422)
        return Response(mask_png, media_type="image/png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="edaformer_t.scenes")
    parser.add_argument("--reduction")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    server = litserve.LitServer(Masks(args.model, args.reduction), accelerator="auto", max_payload_size=30 * 2**20)
    server.run(host="127.0.0.1", port=args.port, num_api_servers=1, generate_client_file=False, log_level="warning")
