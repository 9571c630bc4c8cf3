// A device guard for CUDA that does nothing: torch accepts tensors on "cuda" where there is no GPU and no CUDA.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct OneDevice : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new OneDevice());

}  // namespace
