// A device for tests: torch's PrivateUse1 backend over host memory. Every operator runs as its CPU kernel on an alias
// of the same memory; what CUDA would refuse (operands on two devices, a generator of another device) is refused.
#include <torch/extension.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <map>
#include <mutex>
#include <set>

namespace {
constexpr auto kDev = c10::DeviceType::PrivateUse1;
const c10::Device DEV(kDev, 0);

struct Alloc final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? c10::alloc_cpu(n) : nullptr;
    return {p, p, &del, DEV};
  }
  static void del(void* p) { if (p) c10::free_cpu(p); }
  c10::DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, std::size_t n) const override { std::memcpy(d, s, n); }
};
Alloc ALLOC;

struct Gen final : at::CPUGeneratorImpl {
  Gen() : at::CPUGeneratorImpl() { pretend(true); }
  void pretend(bool on) {
    device_ = on ? DEV : c10::Device(c10::kCPU);
    key_set_ = on ? c10::DispatchKeySet(c10::DispatchKey::PrivateUse1) : c10::DispatchKeySet(c10::DispatchKey::CPU);
  }
};
long GENERATORS = 0;
at::Generator new_gen() { GENERATORS++; return at::make_generator<Gen>(); }
at::Generator& default_gen() { static at::Generator g = at::make_generator<Gen>(); return g; }

struct Hooks final : at::PrivateUse1HooksInterface {
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_gen(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_gen(); }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  void init() const override {}
  bool isAvailable() const override { return true; }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto fresh = ALLOC.allocate(n);
    std::memcpy(fresh.get(), s.data(), std::min(n, s.nbytes()));
    auto* impl = s.unsafeGetStorageImpl();
    impl->set_data_ptr(std::move(fresh));
    impl->set_nbytes(n);
  }
};

void resize_to(c10::TensorImpl* impl, at::IntArrayRef size) {
  impl->set_sizes_contiguous(size);
  size_t need = (impl->storage_offset() + impl->numel()) * impl->dtype().itemsize();
  const c10::Storage& s = impl->storage();
  if (s.nbytes() < need) {
    auto fresh = ALLOC.allocate(need);
    if (s.nbytes()) std::memcpy(fresh.get(), s.data(), s.nbytes());
    s.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    s.unsafeGetStorageImpl()->set_nbytes(need);
  }
}

at::Tensor on_cpu(const at::Tensor& t) {  // the same memory, called CPU
  if (t._is_zerotensor()) return at::_efficientzerotensor(t.sizes(), t.options().device(c10::kCPU));
  auto keep = t;
  void* p = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
  auto r = at::from_blob(p, t.sizes(), t.strides(), [keep](void*) {}, t.options().device(c10::kCPU).requires_grad(false));
  if (t.is_conj()) r._set_conj(true);
  if (t.is_neg()) r._set_neg(true);
  return r;
}

at::Tensor zero_tensor(at::IntArrayRef size, c10::ScalarType kind) {  // zeros without memory, of forward-mode AD
  at::native::ZeroTensorAllocator allocator(DEV);
  const auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1) | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor);
  return at::detail::empty_generic(size, &allocator, keys, kind, std::nullopt);
}

at::Tensor on_dev(const at::Tensor& c) {  // the same memory, called the device's
  if (c._is_zerotensor()) return zero_tensor(c.sizes(), c.scalar_type());
  auto* held = new at::Tensor(c);
  void* p = const_cast<void*>(c.storage().data());
  c10::DataPtr ptr(p, held, [](void* h) { delete static_cast<at::Tensor*>(h); }, DEV);
  c10::Storage s(c10::Storage::use_byte_size_t{}, c.storage().nbytes(), std::move(ptr), &ALLOC, true);
  auto t = at::detail::make_tensor<c10::TensorImpl>(std::move(s), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(c.sizes(), c.strides(), c.storage_offset());
  if (c.is_conj()) t._set_conj(true);
  if (c.is_neg()) t._set_neg(true);
  return t;
}

std::mutex LOCK;
std::map<std::string, long> COUNTS;
long SYNCS = 0;
bool COUNTING = false;
py::object ON_SYNC;
const std::set<std::string> SYNCING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
  "aten::equal", "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim", "aten::repeat_interleave.Tensor",
  "aten::linalg_inv_ex", "aten::_linalg_eigh", "aten::linalg_eig", "aten::_linalg_svd", "aten::linalg_cholesky_ex",
  "aten::_linalg_solve_ex", "aten::bincount", "aten::histc", "aten::is_nonzero"};

void count(const std::string& name, bool sync) {
  if (!COUNTING) return;
  { std::lock_guard<std::mutex> l(LOCK); COUNTS[name]++; if (sync) SYNCS++; }
  if (sync) {
    py::gil_scoped_acquire g;
    if (ON_SYNC && !ON_SYNC.is_none()) ON_SYNC(name);
  }
}

[[noreturn]] void refuse(const std::string& name, const std::string& why) {
  TORCH_CHECK_WITH(Error, false, "HOST-DEVICE: ", name, ": ", why);
  throw 0;
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  static thread_local int depth = 0;
  struct Deeper { Deeper() { depth++; } ~Deeper() { depth--; } } deeper;
  if (depth > 60) refuse(name, "endless recursion: the operator needs a kernel of its own here");
  const size_t n = schema.arguments().size(), base = stack->size() - n;
  const bool indexing = schema.name() == "aten::index" || schema.name() == "aten::index_put_" ||
      schema.name() == "aten::index_put" || schema.name() == "aten::_index_put_impl_" || schema.name() == "aten::_unsafe_index";
  bool boolean_mask = false;
  auto check = [&](const at::Tensor& t, size_t i, bool in_list) {
    if (!t.defined() || t.device().type() == kDev) {
      if (t.defined() && indexing && in_list && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte)) boolean_mask = true;
      return;
    }
    if (t.device().type() != c10::kCPU) return;
    if (indexing && i == 1) return;  // CUDA takes indices from the CPU (with a copy and a sync)
    bool writes = schema.arguments()[i].alias_info() && schema.arguments()[i].alias_info()->isWrite();
    if (t.dim() == 0 && !writes && !in_list) return;
    std::ostringstream s; s << "argument " << i << " (" << schema.arguments()[i].name() << ", " << t.sizes()
      << " " << t.dtype() << ") is on the CPU, another on the device";
    refuse(name, s.str());
  };
  std::vector<Gen*> flipped;
  std::vector<at::Tensor> originals(n);
  std::vector<at::Tensor> aliases(n);
  for (size_t i = 0; i < n; i++) {
    c10::IValue& v = (*stack)[base + i];
    if (v.isTensor()) { check(v.toTensor(), i, false); }
    else if (v.isTensorList()) { for (const at::Tensor& t : v.toTensorVector()) check(t, i, true); }
    else if (v.isOptionalTensorList()) { for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) if (t) check(*t, i, true); }
    else if (v.isGenerator()) {
      auto g = v.toGenerator();
      if (g.defined() && g.device().type() == c10::kCPU) refuse(name, "a CPU generator for a tensor on the device");
    }
  }
  count(name, SYNCING.count(name) || boolean_mask);
  std::map<void*, at::Tensor> back;
  auto alias = [&](const at::Tensor& t) { if (!t.defined() || t.device().type() != kDev) return t; return on_cpu(t); };
  for (size_t i = 0; i < n; i++) {
    c10::IValue& v = (*stack)[base + i];
    if (v.isTensor()) {
      originals[i] = v.toTensor();
      auto info = schema.arguments()[i].alias_info();
      bool fresh = originals[i].defined() && info && info->isWrite() && originals[i].numel() == 0 && originals[i].device().type() == kDev;
      aliases[i] = fresh ? at::empty(originals[i].sizes(), originals[i].options().device(c10::kCPU)) : alias(originals[i]);
      v = aliases[i];
    }
    else if (v.isTensorList()) {
      c10::List<at::Tensor> l; for (const at::Tensor& t : v.toTensorVector()) l.push_back(alias(t)); v = l;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> l;
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) l.push_back(t ? std::optional<at::Tensor>(alias(*t)) : std::nullopt);
      v = l;
    } else if (v.isGenerator() && v.toGenerator().defined()) {
      auto* g = dynamic_cast<Gen*>(v.toGenerator().unsafeGetGeneratorImpl());
      if (g) { g->pretend(false); flipped.push_back(g); }
    } else if (v.isDevice()) { v = c10::Device(c10::kCPU); }
  }
  try {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  } catch (...) { for (auto* g : flipped) g->pretend(true); throw; }
  for (auto* g : flipped) g->pretend(true);
  for (size_t i = 0; i < n; i++) {  // an out= that was resized
    if (!originals[i].defined() || originals[i].device().type() != kDev) continue;
    auto info = schema.arguments()[i].alias_info();
    if (info && info->isWrite() && aliases[i].sizes() != originals[i].sizes()) {
      resize_to(originals[i].unsafeGetTensorImpl(), aliases[i].sizes());
      on_cpu(originals[i]).copy_(aliases[i]);
    }
  }
  const size_t m = schema.returns().size(), top = stack->size() - m;
  for (size_t r = 0; r < m; r++) {
    c10::IValue& v = (*stack)[top + r];
    auto wrap = [&](const at::Tensor& t) -> at::Tensor {
      if (!t.defined() || t.device().type() != c10::kCPU) return t;
      for (size_t i = 0; i < n; i++) if (aliases[i].defined() && aliases[i].unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return originals[i];
      return on_dev(t);
    };
    if (v.isTensor()) v = wrap(v.toTensor());
    else if (v.isTensorList()) { c10::List<at::Tensor> l; for (const at::Tensor& t : v.toTensorVector()) l.push_back(wrap(t)); v = l; }
  }
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> d, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat> f) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &ALLOC, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(d), f);
}
at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> d, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &ALLOC,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(d));
}
at::Tensor efficient_zero(c10::SymIntArrayRef size, std::optional<at::ScalarType> d, std::optional<at::Layout>,
                          std::optional<at::Device>, std::optional<bool>) {
  return zero_tensor(C10_AS_INTARRAYREF_SLOW(size), c10::dtype_or_default(d));
}
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool) {
  bool a = self.device().type() == kDev, b = dst.device().type() == kDev;
  count(a && b ? "copy:device-device" : a ? "copy:device-host" : "copy:host-device", a && !b);
  at::AutoDispatchBelowADInplaceOrView guard;
  auto d = b ? on_cpu(dst) : dst;
  d.copy_(a ? on_cpu(self) : self);
  return dst;
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  if (dst.sizes() != self.sizes()) resize_to(dst.unsafeGetTensorImpl(), self.sizes());
  return copy_from(self, dst, false);
}
const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  resize_to(self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size));
  return self;
}
void same(const char* name, const at::Tensor& a, const std::optional<at::Tensor>& b) {
  if (b && b->defined() && a.device() != b->device()) refuse(name, "input and weight or bias on different devices");
}
at::Tensor conv(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, c10::SymIntArrayRef s, c10::SymIntArrayRef p,
                c10::SymIntArrayRef d, bool t, c10::SymIntArrayRef op, c10::SymInt g) {
  same("aten::convolution", x, w); same("aten::convolution", x, b);
  count("aten::convolution", false);
  at::AutoDispatchBelowADInplaceOrView guard;
  std::optional<at::Tensor> bias; if (b && b->defined()) bias = on_cpu(*b);
  return on_dev(at::convolution_symint(on_cpu(x), on_cpu(w), bias, s, p, d, t, op, g));
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_backward(const at::Tensor& gr, const at::Tensor& x, const at::Tensor& w, c10::SymIntArrayRef s,
    c10::SymIntArrayRef p, c10::SymIntArrayRef d, bool t, c10::SymIntArrayRef op, c10::SymInt g, std::array<bool, 3> mask) {
  same("aten::convolution_backward", gr, x); same("aten::convolution_backward", gr, w);
  for (int i = 0; i < 2; i++) if (mask[i]) count("aten::convolution_backward", false);
  at::AutoDispatchBelowADInplaceOrView guard;
  std::vector<c10::SymInt> sizes; if (mask[2]) sizes.push_back(t ? w.sym_size(1) * g : w.sym_size(0));
  auto [a, b, c] = at::convolution_backward_symint(on_cpu(gr), on_cpu(x), on_cpu(w),
      mask[2] ? at::OptionalSymIntArrayRef(sizes) : at::OptionalSymIntArrayRef(), s, p, d, t, op, g, mask);
  auto up = [](const at::Tensor& q) { return q.defined() ? on_dev(q) : q; };
  return {up(a), up(b), up(c)};
}
at::Tensor strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> off) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, off.value_or(self.storage_offset()));
  return t;
}
at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  std::vector<int64_t> inferred = at::infer_size(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  auto stride = at::detail::computeStride(self.sizes(), self.strides(), inferred);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with input tensor's size and stride");
  return strided(self, inferred, *stride, std::nullopt);
}
at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return strided(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), std::nullopt);
}
at::Tensor& set_storage(at::Tensor& self, at::Storage s, c10::SymInt off, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(s));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), off.expect_int());
  return self;
}
bool may_replace(const at::Tensor& self, const at::Tensor& from) {  // module.to() keeps its Parameters, as for CUDA
  auto plain = [](const at::Tensor& t) { return t.device().type() == c10::kCPU || t.device().type() == kDev; };
  return plain(self) && plain(from) && self.layout() == from.layout();
}
at::Tensor& set_whole(at::Tensor& self, at::Storage s) {
  int64_t n = static_cast<int64_t>(s.nbytes() / self.dtype().itemsize());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(s));
  impl->set_sizes_contiguous({n});
  impl->set_storage_offset(0);
  return self;
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& other) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(c10::Storage(other.storage()));
  impl->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
  return self;
}
}  // namespace

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kDev; }
  c10::Device exchangeDevice(c10::Device) const override { return DEV; }
  c10::Device getDevice() const override { return DEV; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEV); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, DEV); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEV); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
// The casts of CUDA's autocast.
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_RESULT)
  AT_FORALL_PROMOTE(WIDEST)
}
// A copy reads conjugate and negative views as they are; resolving them first would copy again, without end.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("convolution_overrideable", conv);
  m.impl("convolution_backward_overrideable", conv_backward);
  m.impl("as_strided", strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_efficientzerotensor", efficient_zero);
  m.impl("_has_compatible_shallow_copy_type", may_replace);
}

// Lists of tensors in one launch; torch's kernel for any backend would launch one for each tensor.
void register_foreach() {
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("aten::_foreach_", 0) != 0 || name.name.find("copy") != std::string::npos) continue;
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || name.overload_name.find("out") != std::string::npos) continue;
    const std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  register_foreach();
  c10::SetAllocator(kDev, &ALLOC);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("start", [](py::object f) { std::lock_guard<std::mutex> l(LOCK); COUNTS.clear(); SYNCS = 0; GENERATORS = 0; ON_SYNC = f; COUNTING = true; });
  m.def("stop", []() { COUNTING = false; ON_SYNC = py::object(); return std::make_tuple(COUNTS, SYNCS, GENERATORS); });
  m.def("seed", [](uint64_t s) { default_gen().set_current_seed(s); });
  m.def("default_generator", []() { return default_gen(); });
}
