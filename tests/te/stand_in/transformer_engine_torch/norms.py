"""LayerNorm and RMSNorm over the last dimension."""

from .quantization import result, torch_dtype
from .registry import bound


def _gamma(weight, zero_centered_gamma):
    return weight.float() + 1 if zero_centered_gamma else weight.float()


@bound
def layernorm_fwd(input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    x = input.float()
    mean, rsigma = x.mean(dim=-1), (x.var(dim=-1, unbiased=False) + eps).rsqrt()
    value = (x - mean[..., None]) * rsigma[..., None] * _gamma(weight, zero_centered_gamma)
    if bias is not None:
        value = value + bias.float()
    value = result(value, torch_dtype(otype, input.dtype), quantizer, ln_out)
    return [value, mean.reshape(-1), rsigma.reshape(-1)]


@bound
def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma):
    gradient, rows = (tensor.reshape(-1, x.shape[-1]).float() for tensor in (dz, x))
    normed = (rows - mu[:, None]) * rsigma[:, None]
    weighted = gradient * _gamma(gamma, zero_centered_gamma)
    along = (weighted * normed).mean(dim=1, keepdim=True)
    dx = rsigma[:, None] * (weighted - weighted.mean(dim=1, keepdim=True) - normed * along)
    dgamma, dbeta = ((part.sum(dim=0)).to(gamma.dtype) for part in (gradient * normed, gradient))
    return [dx.view_as(x).to(x.dtype), dgamma, dbeta]


@bound
def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    x = input.float()
    rsigma = (x.square().mean(dim=-1) + eps).rsqrt()
    value = x * rsigma[..., None] * _gamma(weight, zero_centered_gamma)
    return [result(value, torch_dtype(otype, input.dtype), quantizer, ln_out), None, rsigma.reshape(-1)]


@bound
def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    gradient, rows = (tensor.reshape(-1, x.shape[-1]).float() for tensor in (dz, x))
    normed = rows * rsigma[:, None]
    weighted = gradient * _gamma(gamma, zero_centered_gamma)
    dx = rsigma[:, None] * (weighted - normed * (weighted * normed).mean(dim=1, keepdim=True))
    return [dx.view_as(x).to(x.dtype), (gradient * normed).sum(dim=0).to(gamma.dtype)]


@bound
def rmsnorm_bwd_add(dz, x, add, rsigma, gamma, sm_margin, zero_centered_gamma):
    dx, dgamma = rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma)
    return [dx + add.view_as(dx), dgamma]
