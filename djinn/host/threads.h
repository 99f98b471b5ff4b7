// Threads that take blocks of a task from one counter, each on a processor of its own.
//
// Between tasks they spin, so that the next one begins within a microsecond, and sleep after 50 ms without one. A task
// is done when all blocks are: a thread that the system does not let run in time is not waited for.

#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Threads {
  public:
    // Starts a thread on each of these processors, or anywhere for one below zero.
    // Throws std::system_error where the system starts no more.
    Threads(const int* cpus, int count) {
        try {
            for (const int* cpu = cpus; cpu < cpus + count; cpu++) {
                threads.emplace_back(&Threads::serve, this);
                if (*cpu >= 0) pin(threads.back(), *cpu);
            }
        } catch (...) {
            end();
            throw;
        }
    }

    ~Threads() { end(); }

    // Calls `block` with each number below `blocks`; the calling thread takes part. One call at a time.
    void run(int64_t blocks, std::function<void(int64_t)> block) {
        task = std::move(block), task_blocks = blocks, taken = 0;
        state = (state.load() / ROUND + 1) * ROUND | OPEN;
        rouse();
        work();
        state &= ~OPEN;
        for (int spins = 1; state.load() % OPEN; spins++) spin(spins);
    }

    static constexpr auto PATIENCE = std::chrono::milliseconds(50);
    typedef std::chrono::steady_clock Clock;

    static void pin(std::thread& thread, int cpu) {
        cpu_set_t only;
        CPU_ZERO(&only);
        CPU_SET(cpu, &only);
        pthread_setaffinity_np(thread.native_handle(), sizeof only, &only);
    }

    static void spin(int spins) {
        if (spins % 64 == 0) return std::this_thread::yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

  private:
    static constexpr uint64_t OPEN = 1 << 16, CLOSING = 1 << 17, ROUND = uint64_t(1) << 32;
    std::function<void(int64_t)> task;
    int64_t task_blocks = 0;
    std::vector<std::thread> threads;
    std::mutex lock;
    std::condition_variable wake;
    alignas(64) std::atomic<uint64_t> state{0};  // round, whether its task is open, and how many threads are inside it
    alignas(64) std::atomic<int64_t> taken{0};   // blocks
    alignas(64) std::atomic<int> asleep{0};

    void work() {
        std::fenv_t callers;
        std::fegetenv(&callers);
        std::fesetenv(FE_DFL_ENV);  // the caller may have asked for denormals as zeros
        for (int64_t block; (block = taken.fetch_add(1)) < task_blocks;) task(block);
        std::fesetenv(&callers);
    }

    void serve() {
        uint64_t last = 0;  // round that this thread took part in
        auto wanted = [&](uint64_t now) { return now & CLOSING || (now & OPEN && now / ROUND != last); };
        auto since = Clock::now();
        for (int spins = 0;; spins++) {
            uint64_t now = state.load();
            if (now & CLOSING) return;
            if (wanted(now)) {
                if (!state.compare_exchange_strong(now, now + 1)) continue;
                last = now / ROUND;
                work();
                state--;
                since = Clock::now();
            } else if (spins % 64 == 0 && Clock::now() - since > PATIENCE) {
                std::unique_lock<std::mutex> guard(lock);
                asleep++;
                wake.wait(guard, [&] { return wanted(state.load()); });
                asleep--;
            } else {
                spin(spins);
            }
        }
    }

    void rouse() {
        if (asleep.load() == 0) return;
        std::lock_guard<std::mutex> guard(lock);  // so that none is between its look at the state and its sleep
        wake.notify_all();
    }

    void end() {
        state |= CLOSING;
        rouse();
        for (auto& thread : threads) thread.join();
    }
};
