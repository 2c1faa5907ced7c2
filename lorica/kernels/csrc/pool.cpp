// A pool for torch's CPU tensors: best fit, and neighbours that grow together again. See ../pool.py for the reasons and
// training/heap.py for the same algorithm in Python, by which a plan predicts what the pool will hold.
//
// All tensors live in one range of addresses that is reserved at the start and filled from the bottom, so a page is
// touched for the first time once in the life of a process. Nothing is ever given back before the process ends. A
// forked process, as a DataLoader's worker is, has a copy of the pool.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstring>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

// Twice a cache line would do; 64 is what torch's own allocator promises.
constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t(2) << 20;

class Pool final : public c10::Allocator {
 public:
  bool reserve(size_t capacity) {
    void* range = mmap(nullptr, capacity + kHugePage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return false;
    const auto address = reinterpret_cast<size_t>(range);
    base_ = reinterpret_cast<char*>((address + kHugePage - 1) / kHugePage * kHugePage);
    capacity_ = capacity;
    // Advice only: without it everything works, a little slower.
    madvise(base_, capacity_, MADV_HUGEPAGE);
    return true;
  }

  c10::DataPtr allocate(size_t num_bytes) override {
    void* data = num_bytes == 0 ? nullptr : take(num_bytes);
    return {data, data, &Pool::release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Pool::release; }

  void copy_data(void* to, const void* from, size_t num_bytes) const override { std::memcpy(to, from, num_bytes); }

  size_t top() {
    std::lock_guard<std::mutex> lock(mutex_);
    return top_;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  void* take(size_t num_bytes) {
    TORCH_CHECK(num_bytes <= capacity_, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", num_bytes,
                " bytes, more than the machine has.");
    const size_t size = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    std::lock_guard<std::mutex> lock(mutex_);
    size_t begin = top_;
    const auto hole = holes_.lower_bound({size, 0});
    if (hole != holes_.end()) {
      const size_t hole_size = hole->first;
      begin = hole->second;
      remove(begin, hole_size);
      if (hole_size > size) insert(begin + size, hole_size - size);
    } else {
      // A hole at the very top grows upwards.
      const auto last = begin_of_hole_ending_at_.find(top_);
      if (last != begin_of_hole_ending_at_.end()) begin = last->second;
      TORCH_CHECK(begin + size <= capacity_, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ",
                  num_bytes, " bytes beside ", top_, ", more than the machine has.");
      if (begin < top_) remove(begin, top_ - begin);
      top_ = begin + size;
    }
    taken_[begin] = size;
    return base_ + begin;
  }

  void give(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t begin = static_cast<char*>(data) - base_;
    const auto block = taken_.find(begin);
    size_t size = block->second;
    taken_.erase(block);
    const auto before = begin_of_hole_ending_at_.find(begin);
    if (before != begin_of_hole_ending_at_.end()) {
      const size_t start = before->second;
      remove(start, begin - start);
      size += begin - start;
      begin = start;
    }
    const auto after = size_of_hole_at_.find(begin + size);
    if (after != size_of_hole_at_.end()) {
      const size_t more = after->second;
      remove(begin + size, more);
      size += more;
    }
    insert(begin, size);
  }

  void insert(size_t begin, size_t size) {
    holes_.insert({size, begin});
    size_of_hole_at_[begin] = size;
    begin_of_hole_ending_at_[begin + size] = begin;
  }

  void remove(size_t begin, size_t size) {
    holes_.erase({size, begin});
    size_of_hole_at_.erase(begin);
    begin_of_hole_ending_at_.erase(begin + size);
  }

  static void release(void* data);

  char* base_ = nullptr;
  size_t capacity_ = 0;
  size_t top_ = 0;
  std::mutex mutex_;
  std::set<std::pair<size_t, size_t>> holes_;  // (size, begin)
  std::unordered_map<size_t, size_t> size_of_hole_at_, begin_of_hole_ending_at_, taken_;
};

// Never destroyed: tensors may outlive static objects.
Pool* pool = nullptr;

void Pool::release(void* data) {
  if (data != nullptr) pool->give(data);
}

}  // namespace

// Let torch's CPU tensors live in a pool of at most `capacity` bytes from now on; 0 where that much address space
// cannot be reserved.
extern "C" int lorica_install_pool(size_t capacity) {
  if (pool != nullptr) return 1;
  auto* made = new Pool();
  if (!made->reserve(capacity)) {
    delete made;
    return 0;
  }
  pool = made;
  // Else a fork while another thread allocates would leave the child with a lock that nobody opens.
  pthread_atfork([] { pool->lock(); }, [] { pool->unlock(); }, [] { pool->unlock(); });
  c10::SetCPUAllocator(pool, /*priority=*/1);
  return 1;
}

// Bytes of the range that were ever in use.
extern "C" size_t lorica_pool_bytes() { return pool == nullptr ? 0 : pool->top(); }
